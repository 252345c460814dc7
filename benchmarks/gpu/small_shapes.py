"""Every kernel once or twice on small shapes, for `compute-sanitizer`.

python -m benchmarks.gpu.small_shapes cuda
"""

import sys

import torch

from benchmarks.gpu import collating
from convai_fast import ops


def draw(device: torch.device) -> None:
    """Rows that end within a vector, and that several blocks share."""
    for rows, vocab_size in ((1, 17), (3, 1019), (2, 50_262)):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, vocab_size, device=device).to(dtype)
            ops.sample(logits, temperature=0.7, top_k=9, top_p=0.9, return_logprobs=True)


def collate(device: torch.device) -> None:
    """Both layouts."""
    store = collating.Store(num_utterances=50, examples=3, num_candidates=4)
    ops.collate(*store.tables(device), *store.padded)
    ops.collate_shared(*store.tables(device), *store.shared)


def attend(device: torch.device) -> None:
    """Rows of no past and of much, and heads that share keys."""
    for num_heads, num_kv_heads, head_dim in ((2, 2, 64), (4, 2, 24)):
        cache = torch.zeros(2, 3, 200, num_kv_heads, head_dim, device=device)
        q = torch.randn(3, num_heads, head_dim, device=device)
        k, v = torch.randn(2, 3, num_kv_heads, head_dim, device=device)
        slots, lengths = torch.tensor([[2, 0, 1], [0, 199, 33]], device=device)
        ops.decode_attention(q, k, v, *cache, slots, lengths)


def add_and_norm(device: torch.device) -> None:
    """A width of whole vectors, and another."""
    for n_embd in (768, 99):
        x, residual, weight, bias = torch.randn(4, 3, n_embd, device=device)
        ops.add_norm(x, residual, weight[0], bias[0], eps=1e-5)


def main() -> None:
    """Run all of them."""
    device = torch.device(sys.argv[1])
    draw(device)
    collate(device)
    attend(device)
    add_and_norm(device)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""`convai-fast info`: versions, and what is compiled and in use."""

import pytest

from convai_fast import _native
from convai_fast.cli import info
from convai_fast.cli.info import package_version
from convai_fast.cli.main import main
from tests.helpers.command_line import run


def test_a_package_without_metadata_has_a_version_to_tell():
    told = {name: package_version(name) for name in ("torch", "no-package-of-this-name")}
    assert all(isinstance(version, str) and version for version in told.values())
    assert told["torch"][0].isdecimal()
    assert not told["no-package-of-this-name"][0].isdecimal()
    assert all(package_version(name) for name in info.PACKAGES)


def test_info_prints_versions_and_what_is_compiled(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "transformers", "built", "in use", "cpu", "cpu products", "cuda"):
        assert f"\n{name} " in printed
    if _native.host is not None:
        assert f"instruction set {_native.native_info()['isa']}" in printed


def test_info_names_the_instructions_that_each_format_is_multiplied_in():
    def products(**environment):
        lines = run("info", **environment).stdout.splitlines()
        return next(line for line in lines if line.startswith("cpu products "))

    assert products(CONVAI_FAST_BACKEND="reference").endswith(
        "float32 plain PyTorch, bfloat16 plain PyTorch, int8 plain PyTorch"
    )
    if _native.host is not None:
        assert products(CONVAI_FAST_ISA="portable").endswith(
            "float32 portable, bfloat16 portable, int8 portable"
        )


def test_the_reference_backend_runs_without_anything_compiled():
    result = run("info", CONVAI_FAST_BACKEND="reference")
    assert "plain PyTorch: CONVAI_FAST_BACKEND=reference" in result.stdout


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CONVAI_FAST_BACKEND": "fortran"}, "must be auto, native or reference, not 'fortran'"),
        ({"CONVAI_FAST_ISA": "sse"}, "must be portable, avx2, avx512 or avx512_bf16, not 'sse'"),
    ],
)
def test_an_unknown_backend_or_instruction_set_is_one_sentence(environment, says):
    result = run("info", **environment)
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1

// Host functions that need no tensor, on numpy arrays, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#include <unistd.h>
#endif

#include "index.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace convai_fast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple index_examples(const Array<int64_t>& utterance_offsets,
                         const Array<int64_t>& persona_offsets, const Array<int32_t>& persona_ids,
                         const Array<int32_t>& history_ids, const Array<int32_t>& dialogue,
                         const Array<int64_t>& history_first, const Array<int32_t>& history_count,
                         const Array<int64_t>& candidate_offsets,
                         const Array<int32_t>& candidate_ids, const Array<int64_t>& layout_numbers,
                         int64_t history_turns, int64_t num_candidates, int64_t max_length,
                         int64_t permutations) {
  const SplitTables tables{
      utterance_offsets.data(), persona_offsets.data(),   persona_ids.data(),
      history_ids.data(),       dialogue.data(),          history_first.data(),
      history_count.data(),     candidate_offsets.data(), candidate_ids.data()};
  const auto& layout = *reinterpret_cast<const Layout*>(layout_numbers.data());
  const IndexOptions options{history_turns, num_candidates, max_length};
  const int64_t examples = dialogue.size();
  Array<int64_t> plan({examples * permutations, kPlanColumns});
  Array<int32_t> sizes({examples * permutations, kSizeColumns});
  auto* rows = reinterpret_cast<PlanRow*>(plan.mutable_data());
  auto* row_sizes = reinterpret_cast<RowSizes*>(sizes.mutable_data());
  CutCounts cuts;
  {
    const py::gil_scoped_release unlocked;
    for (int64_t rotation = 0; rotation < permutations; ++rotation) {
      for (int64_t example = 0; example < examples; ++example) {
        const int64_t i = rotation * examples + example;
        row_sizes[i] = index_example(tables, layout, options, example, rotation, rows + i, &cuts);
      }
    }
  }
  return py::make_tuple(plan, sizes, py::make_tuple(cuts.history, cuts.persona, cuts.reply));
}

// Training frees and takes the same megabytes again all the time. By default glibc hands large
// blocks back to the system at once, which then clears every page anew. Here it keeps them, in a
// heap that grows at once, so that all of it can be asked to lie in huge pages; memory that nobody
// has written to is not used. Returns whether glibc could be asked.
bool keep_freed_memory() {
#ifdef __GLIBC__
  constexpr uintptr_t kHugePage = 2 << 20;
  if (mallopt(M_MMAP_MAX, 0) != 1 || mallopt(M_TRIM_THRESHOLD, -1) != 1) return false;
  const size_t size = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 2;
  if (void* heap = std::malloc(size)) {
    const auto first = (reinterpret_cast<uintptr_t>(heap) + kHugePage - 1) / kHugePage * kHugePage;
    const auto last = reinterpret_cast<uintptr_t>(heap) + size;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    std::free(heap);
  }
  return true;
#else
  return false;
#endif
}

// Asks for huge pages where this memory is mapped: reading weights from front to back then waits
// less for page tables. Before anything is written there.
void use_huge_pages(uintptr_t first, size_t size) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + size) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace convai_fast

PYBIND11_MODULE(_host, m) {
  m.def("index_examples", &convai_fast::index_examples);
  m.def("use_huge_pages", &convai_fast::use_huge_pages);
  m.def("keep_freed_memory", &convai_fast::keep_freed_memory);
  m.def("isa", [] { return convai_fast::simd::isa_name(convai_fast::simd::current_isa()); });
}

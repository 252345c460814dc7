// Token ids are stored in 16 or 32 bits and handed out in 64. The compiler turns the loop into the
// widening loads of each instruction set.

namespace convai_fast::collate::CONVAI_FAST_ISA {

template <typename Token>
CONVAI_FAST_TARGET void widen(const Token* source, int64_t* target, int64_t length) {
  for (int64_t i = 0; i < length; ++i) target[i] = source[i];
}

}  // namespace convai_fast::collate::CONVAI_FAST_ISA

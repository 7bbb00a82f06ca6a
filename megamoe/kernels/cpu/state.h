// The floating-point state of a thread while it computes: nothing is flushed, and rounding is to nearest.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace megamoe {

// A caller may have asked for subnormals to be flushed; its threads have not, and bits must not depend on that.
class RoundToNearest {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();

public:
    RoundToNearest() { _mm_setcsr(0x1F80); }
    ~RoundToNearest() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

public:
    RoundToNearest() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
    }
    ~RoundToNearest() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
public:
    RoundToNearest() {}
#endif
};

}  // namespace megamoe

// What the sources of a library share: the functions that others of them call, and the floating-point state of a thread.
#pragma once

#include <cstdint>

// Declared for whoever defines them too, so that both keep to the same parameters.
extern "C" {
void megamoe_products(const uint16_t* x, int64_t x_stride, const int64_t* source, int64_t k, const uint8_t* packed,
                      const uint8_t* scales, int64_t packed_bytes, int64_t scales_bytes, int64_t n,
                      const int64_t* counts, int64_t experts, void* out, int64_t out_stride, const int64_t* goes,
                      int wide, int threads);
void megamoe_quantize(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t width, uint8_t* values,
                      int64_t values_stride, uint8_t* scales, int64_t scales_stride, const int64_t* goes, int threads);
void megamoe_dequantize(const uint8_t* values, int64_t values_stride, const uint8_t* scales, int64_t scales_stride,
                        int64_t rows, int64_t width, uint16_t* out, int64_t out_stride, int threads);
void megamoe_round(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t width, uint16_t* out, int64_t out_stride,
                   int threads);
void megamoe_activate(const uint16_t* gate_up, const float* weights, int64_t rows, int64_t width, int gated,
                      const float* table, const float* up_table, float limit, float shift, int quantized, uint16_t* out,
                      int threads);
void megamoe_add_bias(const float* sums, int64_t width, const float* bias, const int64_t* counts, int64_t experts,
                      const float* weights, uint16_t* out, int64_t out_stride, const int64_t* goes, int threads);
}

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace megamoe {

// While it computes nothing is flushed, and rounding is to nearest.
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

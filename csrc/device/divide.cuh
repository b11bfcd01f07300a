// Division without branches.
#pragma once
#include "numeric.cuh"

namespace fisnet {
// d(x) = x / y, for one y and any number of x.
//
// The compiler's own float32 division checks its operands and calls a slow path for each odd one, 0 / y among them: half of
// the activations of a ReLU are 0. The checks also keep neighbouring divisions apart in time. This one multiplies by the
// correctly rounded reciprocal instead (the hardware's approximation and one Newton step), after a power of two has taken
// very small and very large y where reciprocals are normal numbers. At most 1.5 units in the last place; 0, infinities,
// NaN and subnormal numbers as in IEEE division. No fast-math: nothing is flushed to 0.
template <typename A> class Divisor;

template <> class Divisor<float> {
 public:
  __device__ __forceinline__ explicit Divisor(float y) {
    const float size = fabsf(y);
    back_ = size < 0x1p-64f ? 0x1p64f : size > 0x1p64f ? 0x1p-64f : 1.0f;
    const float near_one = y * back_;
#if defined(FISNET_EMU)
    inverse_ = 1.0f / near_one;
#else
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(near_one));
    // fminf answers 1 for NaN, which is what 1 - y guess gives for y = 0 and y = inf, where the guess itself is right
    inverse_ = fmaf(guess, fminf(fmaf(-near_one, guess, 1.0f), 1.0f), guess);
#endif
  }
  __device__ __forceinline__ float operator()(float x) const { return x * inverse_ * back_; }

 private:
  float inverse_, back_;
};

template <> class Divisor<double> {
 public:
  __device__ __forceinline__ explicit Divisor(double y) : y_(y) {}
  __device__ __forceinline__ double operator()(double x) const { return x / y_; }

 private:
  double y_;
};
}  // namespace fisnet

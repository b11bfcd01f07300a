// phi(a) = a / (a + e), the factor of LRP-epsilon at a ReLU.
#pragma once
#include "divide.cuh"

namespace fisnet {
// Without epsilon, phi is the ReLU's own derivative: any unit that is alive is as good as 1, exactly.
template <typename A> __device__ __forceinline__ A gated(A a, A e) { return e == A(0) ? (a > A(0) ? A(1) : A(0)) : a; }

// The denominator v + e of a value v >= 0; where both are 0 it is 1, so that 0 / 0 is 0.
template <typename A> __device__ __forceinline__ A denominator(A v, A e) {
  const A sum = v + e;
  return sum == A(0) ? A(1) : sum;
}

template <typename A> __device__ __forceinline__ A phi(A a, A e) { return Divisor<A>(denominator(a, e))(a); }

// The adjoint of s = phi(a) g at s_bar: g_bar = a / (a + e) s_bar;  a_bar = e / (a + e) (s / a) s_bar, 0 where the unit is dead.
// The ratios are formed first, so that nothing underflows or overflows on the way.
template <typename A> struct PhiAdjoint {
  A g_bar, a_bar;

  __device__ __forceinline__ PhiAdjoint(A a, A e, A s, A s_bar) {
    const A alive = gated(a, e);
    const Divisor<A> over(denominator(alive, e));
    g_bar = over(alive) * s_bar;
    a_bar = over(alive == A(0) ? A(0) : e) * Divisor<A>(denominator(alive, A(0)))(s) * s_bar;
  }
};
}  // namespace fisnet

// Both rules of Dual at a ReLU, LRP-epsilon and z+, and their adjoint: one unit.
#pragma once
#include "phi.cuh"

namespace fisnet {
// s = a / (a + e) . g;  s+ = a g+ / (z+ + e+), 0 / 0 = 0.
template <typename A> struct DualPhi {
  A s, s_plus;

  __device__ __forceinline__ DualPhi(A g, A g_plus, A a, A z_plus, A e, A e_plus)
      : s(phi(gated(a, e), e) * g), s_plus(a * Divisor<A>(denominator(z_plus, e_plus))(g_plus)) {}
};

// g_bar = a / (a + e) s_bar;  g+_bar = a u+, u+ = s+_bar / (z+ + e+);  z+_bar = -s+ u+;
// a_bar = e / (a + e) (s / a) s_bar + (s+ / a) s+_bar, 0 where the unit is dead (the ReLU before it cuts that gradient).
// The ratios are formed first, so that nothing underflows or overflows on the way.
template <typename A> struct DualPhiAdjoint {
  A g_bar, g_plus_bar, a_bar, z_plus_bar;

  __device__ __forceinline__ DualPhiAdjoint(A s_bar, A s_plus_bar, A a, A s, A s_plus, A z_plus, A e, A e_plus) {
    const A alive = gated(a, e), u_plus = Divisor<A>(denominator(z_plus, e_plus))(s_plus_bar);
    const Divisor<A> over(denominator(alive, e)), over_a(denominator(a, A(0)));
    const A on = a == A(0) ? A(0) : A(1);
    g_bar = over(alive) * s_bar;
    g_plus_bar = a * u_plus;
    a_bar = over(on * e) * over_a(e == A(0) ? A(0) : s) * s_bar + on * over_a(s_plus) * s_plus_bar;
    z_plus_bar = -s_plus * u_plus;
  }
};
}  // namespace fisnet

// out = T(T(silu(gate)) * up), each with its bias added and rounded first. A thread computes a pack of N elements.
// gate, up (rows, F), or with JOINED both the same (rows, 2 F); with BIAS their biases (F), or both the same (2 F);
// out (rows, F); all T. Grid: (rows, packs of a row). Template: T, F, N, JOINED, BIAS.
const uint column = thread_position_in_grid.y * uint(N);
const uint row = thread_position_in_grid.x;
if (column < uint(F)) {
  const uint second = JOINED ? uint(F) + column : column;
  const uint start = row * uint(JOINED ? 2 * F : F);
  Pack<N> g = load<N>(gate, start + column);
  Pack<N> u = load<N>(up, start + second);
  if (BIAS) {
    const Pack<N> gb = load<N>(gate_bias, column);
    const Pack<N> ub = load<N>(up_bias, second);
    for (int k = 0; k < N; ++k) {
      g.v[k] = float(T(g.v[k] + gb.v[k]));
      u.v[k] = float(T(u.v[k] + ub.v[k]));
    }
  }
  for (int k = 0; k < N; ++k) {
    u.v[k] = swiglu<T>(g.v[k], u.v[k]);
  }
  store<T>(out, row * uint(F) + column, u);
}

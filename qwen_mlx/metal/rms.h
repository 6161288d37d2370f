// RMSNorm's arithmetic, which rms_norm.metal, add_rms_norm.metal and the matrix-vector kernels share.

// A factor as a sum of two floats, so that the product with it rounds once.
struct Inverse {
  float high, low;
};

// 1 / sqrt(sum / count + eps). The low part holds what the division, the addition and the root round off.
FUNCTION Inverse inverse_root_mean(float sum, float count, float eps) {
  const float mean = sum / count;
  const float x = mean + eps;
  const float added = x - mean;
  const float lost = (mean - (x - added)) + (eps - added) + metal::fma(-mean, count, sum) / count;
  Inverse inverse;
  inverse.high = 1.0f / metal::precise::sqrt(x);
  const float product = x * inverse.high;
  const float missing = metal::fma(x, inverse.high, -product) + lost * inverse.high;
  inverse.low = 0.5f * inverse.high * (metal::fma(-product, inverse.high, 1.0f) - missing * inverse.high);
  // The inverse of an infinite x is 0 and has no low part; written so that NaN is caught too.
  if (!(metal::abs(inverse.low) < inverse.high)) {
    inverse.low = 0.0f;
  }
  return inverse;
}

// weight * T(x * scale). Where T is float nothing is rounded between the two products.
template <typename T>
FUNCTION float scaled_by(float x, Inverse scale, float weight) {
  const float normed = metal::fma(x, scale.high, x * scale.low);
  const float y = weight * float(T(normed));
  if (sizeof(T) < 4 || y == 0.0f || !metal::isfinite(y)) {
    return y;
  }
  const float lost = metal::fma(x, scale.high, -normed) + x * scale.low;
  return metal::fma(weight, normed, weight * lost);
}

template <int N>
FUNCTION float sum_of_squares(Pack<N> x) {
  float sum = 0.0f;
  UNROLL
  for (int k = 0; k < N; ++k) {
    sum = metal::fma(x.v[k], x.v[k], sum);
  }
  return sum;
}

// The sum over all threads of a threadgroup of SIMDS simdgroups; `partial` has room for SIMDS floats. Contains a barrier.
template <int SIMDS, typename Partial>
FUNCTION float threadgroup_sum(float x, Partial partial, uint lane, uint simd) {
  const float sum = metal::simd_sum(x);
  if (lane == 0u) {
    partial[simd] = sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return metal::simd_sum(lane < uint(SIMDS) ? partial[lane] : 0.0f);
}

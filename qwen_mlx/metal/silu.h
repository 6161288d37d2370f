// x / (1 + e^-x) to 0.8 ulp in float32, for every finite x. e^-|x| is kept as 2^-n (high + low), and 2^-n is multiplied last, so
// that a small result is not formed from a subnormal factor. As in torch silu(inf) = inf and silu(-inf) = NaN.
FUNCTION float silu(float x) {
  if (!metal::isfinite(x)) {
    return x > 0.0f ? x : x * 0.0f;
  }
  // Below -120 the result is -0.
  x = x < -120.0f ? -120.0f : x;
  const float size = metal::min(metal::abs(x), 120.0f);
  const float n = metal::rint(size * 1.44269504f);
  // ln 2 in two parts: n times the first is exact.
  const float r = metal::fma(n, -2.12194440e-4f, metal::fma(n, 0.693359375f, -size));
  float p = 2.48015873e-5f;
  p = metal::fma(p, r, 1.98412698e-4f);
  p = metal::fma(p, r, 1.38888889e-3f);
  p = metal::fma(p, r, 8.33333333e-3f);
  p = metal::fma(p, r, 4.16666667e-2f);
  p = metal::fma(p, r, 1.66666667e-1f);
  p = metal::fma(p, r, 0.5f) * r * r;
  const float q = r + p;
  const float high = 1.0f + q;
  const float low = ((1.0f - high) + q) + ((r - q) + p);

  const int half_n = int(n) / 2;
  const float power_a = as_type<float>((127 - half_n) << 23);
  const float power_b = as_type<float>((127 - (int(n) - half_n)) << 23);
  const float power = power_a * power_b;
  const float denominator = 1.0f + high * power;
  const float missing = metal::fma(high, power, 1.0f - denominator) + low * power;
  const float inverse = 1.0f / denominator;
  const float error = metal::fma(-denominator, inverse, 1.0f) - missing * inverse;
  // The sigmoid, without the power where x is negative.
  const float factor = x < 0.0f ? high : 1.0f;
  const float sigmoid = factor * inverse;
  const float rest = metal::fma(factor, inverse, -sigmoid) + sigmoid * error + (x < 0.0f ? low * inverse : 0.0f);
  const float y = metal::fma(x, sigmoid, x * rest);
  return x < 0.0f ? y * power_a * power_b : y;
}

// T(silu(gate)) * up, as transformers rounds it.
template <typename T>
FUNCTION float swiglu(float gate, float up) {
  const float activated = sizeof(T) == 4 ? silu(gate) : gate / (1.0f + metal::precise::exp(-gate));
  return float(T(activated)) * up;
}

// What rms_norm.metal and add_rms_norm.metal share.

// 1 / sqrt(x) as a sum of two floats: with the second, the product of the norm rounds once.
struct Inverse {
  float high, low;
};

FUNCTION Inverse inverse_root(float x) {
  Inverse inverse;
  inverse.high = 1.0f / metal::precise::sqrt(x);
  float product = x * inverse.high;
  float rest = metal::fma(-product, inverse.high, 1.0f) - metal::fma(x, inverse.high, -product) * inverse.high;
  inverse.low = 0.5f * inverse.high * rest;
  // An infinite x has the inverse 0 and no second part; written so that NaN is caught too.
  if (!(metal::abs(inverse.low) < inverse.high)) {
    inverse.low = 0.0f;
  }
  return inverse;
}

// weight * T(x * scale); where T is float nothing is rounded between the two products.
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

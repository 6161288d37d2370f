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

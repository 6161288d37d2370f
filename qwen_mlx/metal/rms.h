// What rms_norm.metal and add_rms_norm.metal share.

// A factor as a sum of two floats: with the second, the product with it rounds once.
struct Inverse {
  float high, low;
};

// 1 / sqrt(sum / count + eps), with what the division, the addition and the root round off in the second part.
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

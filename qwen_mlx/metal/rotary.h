// Cosine and sine of a position's angle, exact to about 2^-48, each as a sum of two floats: float32 arithmetic on the
// angle itself would be wrong by 0.03 radians at position 1,000,000.
struct Rotation {
  float cos_high, cos_low, sin_high, sin_low;
};

// The upper 64 bits of a * b, at most 3 too small.
FUNCTION ulong multiply_high(ulong a, ulong b) {
  const ulong a_high = a >> 32;
  const ulong b_high = b >> 32;
  const ulong a_low = a & 0xfffffffful;
  const ulong b_low = b & 0xfffffffful;
  return a_high * b_high + ((a_high * b_low) >> 32) + ((a_low * b_high) >> 32);
}

// high, middle and low: the turns a position makes in units of 2^-96, 32 bits each. Products wrap at whole turns, so
// the range reduction is exact for every int32 position. scale multiplies both (YaRN's attention factor).
FUNCTION Rotation rotation(uint high, uint middle, uint low, int position, float scale, float scale_low) {
  const ulong turns = (ulong(high) << 32) | ulong(middle);
  const ulong phase = turns * ulong(long(position)) + ulong((long(low) * long(position)) >> 32);
  const uint quadrant = uint(phase >> 62);
  // The fraction of a quarter turn in units of 2^-64, and its square.
  const ulong x = phase << 2;
  const ulong y = multiply_high(x, x);
  // Taylor's series of cos(x pi / 2) and sin(x pi / 2), coefficients and sums in units of 2^-62.
  ulong c = 0x0000000000003deeul;
  c = 0x000000000025418bul - multiply_high(c, y);
  c = 0x00000000120c62c3ul - multiply_high(c, y);
  c = 0x00000006db893d13ul - multiply_high(c, y);
  c = 0x000001f9d38a3764ul - multiply_high(c, y);
  c = 0x000069b47ca8812aul - multiply_high(c, y);
  c = 0x000f0fa83448dd5dul - multiply_high(c, y);
  c = 0x0155d3c7e3cbffa0ul - multiply_high(c, y);
  c = 0x103c1f081b5ac3b3ul - multiply_high(c, y);
  c = 0x4ef4f326f9177969ul - multiply_high(c, y);
  c = 0x4000000000000000ul - multiply_high(c, y);
  ulong s = 0x00000000000004a2ul;
  s = 0x0000000000031481ul - multiply_high(s, y);
  s = 0x0000000001aaec33ul - multiply_high(s, y);
  s = 0x00000000b7d6dcf9ul - multiply_high(s, y);
  s = 0x0000003d1e869a03ul - multiply_high(s, y);
  s = 0x00000f183a7ef444ul - multiply_high(s, y);
  s = 0x0002a0f0690fdcf0ul - multiply_high(s, y);
  s = 0x004cb4b3398af617ul - multiply_high(s, y);
  s = 0x0519af19dd6ab875ul - multiply_high(s, y);
  s = 0x295779cc4b7ca57dul - multiply_high(s, y);
  s = multiply_high(0x6487ed5110b4611aul - multiply_high(s, y), x);
  // Quadrants 1 and 3 swap the two; cosine is negative in 1 and 2, sine in 2 and 3.
  const bool swapped = (quadrant & 1u) == 1u;
  long cosine = long(swapped ? s : c);
  long sine = long(swapped ? c : s);
  cosine = (quadrant == 1u || quadrant == 2u) ? -cosine : cosine;
  sine = quadrant >= 2u ? -sine : sine;

  const float unit = 2.16840434e-19f;  // 2^-62
  const float c_high = float(cosine) * unit;
  const float s_high = float(sine) * unit;
  const float c_low = float(cosine - long(float(cosine))) * unit;
  const float s_low = float(sine - long(float(sine))) * unit;
  Rotation r;
  r.cos_high = c_high * scale;
  r.sin_high = s_high * scale;
  r.cos_low = metal::fma(c_high, scale, -r.cos_high) + metal::fma(c_low, scale, c_high * scale_low);
  r.sin_low = metal::fma(s_high, scale, -r.sin_high) + metal::fma(s_low, scale, s_high * scale_low);
  return r;
}

// a (c + c_low) - b (s + s_low), to 2 ulp however much cancels (Kahan's difference of products, Jeannerod et al. 2013).
FUNCTION float difference(float a, float c, float c_low, float b, float s, float s_low) {
  const float product = b * s;
  const float lost = metal::fma(b, s, -product);
  const float y = metal::fma(a, c, -product);
  const float more = metal::fma(a, c_low, -(b * s_low));
  return metal::isfinite(y) ? y + (more - lost) : y;
}

// Rotation of pairs of elements that lie HALF apart in a head.

// Element a of a pair whose other element is b; the other one is rotated(b, -a, cosine, sine).
FUNCTION float rotated(float a, float b, float cosine, float sine) {
  return metal::fma(a, cosine, -(b * sine));
}

// What the backward's launches have in common: the derivative of one logit, from the two products of its pair.
#pragma once
#include "simple_tile.cuh"

struct Derivative {
  float weight;   // P
  float logit;    // by the logit: P (dP - delta)
  float product;  // by query * key
};

// `product` is query * key, `grad_weight` grad_out * value. A row without keys has LSE -inf, and no derivative.
DEVICE Derivative derivative_of(float product, float grad_weight, float lse, float delta, bool kept, float scale,
                                float softcap, const SCORE& score, Where w, int q, int k) {
  if (!kept || lse == NEGATIVE_INFINITY) return {0.0f, 0.0f, 0.0f};
  const Logit logit = logit_of(product, scale, softcap, score, w, q, k);
  const float weight = expf(logit.logit - lse), by_logit = weight * (grad_weight - delta);
  return {weight, by_logit, by_logit * logit.derivative};
}

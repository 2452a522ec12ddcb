/* Derivatives of the expert activations (shared/activation.h), one element at a time: the backward pass needs them and
 * is not bound by them. The forward values are in kernels.h. */
#ifndef MM_CPU_ACTIVATION_H
#define MM_CPU_ACTIVATION_H

#include <math.h>

#include "shared/activation.h"

struct mm_slopes {
    float gate, up; /* d act / d g, d act / d u */
};

static inline struct mm_slopes mm_activation_slopes(enum mm_activation kind, float g, float u, float alpha,
                                                    float limit) {
    switch (kind) {
    case MM_ACTIVATION_SILU: {
        float s = 1.0f / (1.0f + expf(-g));
        return (struct mm_slopes){s * (1.0f + g * (1.0f - s)) * u, g * s};
    }
    case MM_ACTIVATION_GELU: { /* Phi(g) + g phi(g) */
        float phi = 0.5f * (1.0f + erff(g * 0.70710678f)), density = 0.39894228f * expf(-0.5f * g * g);
        return (struct mm_slopes){(phi + g * density) * u, g * phi};
    }
    case MM_ACTIVATION_GELU_TANH: {
        float z = 0.79788456f * (g + 0.044715f * g * g * g), t = tanhf(z);
        float slope = 0.79788456f * (1.0f + 3.0f * 0.044715f * g * g);
        return (struct mm_slopes){(0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * slope) * u, 0.5f * g * (1.0f + t)};
    }
    case MM_ACTIVATION_SWIGLU_OAI: { /* a clamped side has slope 0, as torch.clamp: 1 at the limit itself */
        float gate_open = g > limit ? 0.0f : 1.0f, up_open = u > limit || u < -limit ? 0.0f : 1.0f;
        float gc = g > limit ? limit : g, uc = u > limit ? limit : u < -limit ? -limit : u;
        float s = 1.0f / (1.0f + expf(-alpha * gc));
        return (struct mm_slopes){gate_open * s * (1.0f + alpha * gc * (1.0f - s)) * (uc + 1.0f), up_open * gc * s};
    }
    default:
        return (struct mm_slopes){0, 0};
    }
}

#endif

/* The list of expert activations. X(id, name, formula): g is the gate's output, u the up projection's.
 * alpha and limit are the op's arguments (gpt-oss: 1.702 and 7). Adding one: a line here, its value and derivative
 * in cpu/activation.h, a line in tests/reference.py. */
#ifndef MM_SHARED_ACTIVATION_H
#define MM_SHARED_ACTIVATION_H

#define MM_ACTIVATIONS(X)                                                                    \
    X(MM_ACTIVATION_SILU, "silu", "g sigmoid(g) u")                                          \
    X(MM_ACTIVATION_GELU, "gelu", "g Phi(g) u, Phi by erf")                                  \
    X(MM_ACTIVATION_GELU_TANH, "gelu_tanh", "g Phi(g) u, Phi by Hendrycks and Gimpel's tanh") \
    X(MM_ACTIVATION_SWIGLU_OAI, "swiglu_oai", "g = min(g, limit), u = clamp(u, -limit, limit): g sigmoid(alpha g) (u + 1)")

enum mm_activation {
#define X(id, name, formula) id,
    MM_ACTIVATIONS(X)
#undef X
    MM_ACTIVATION_COUNT
};

#endif

// Threads of our own, which sleep until there is work: one for each core but the caller's.
#ifndef GPUBACKPROP_POOL
#define GPUBACKPROP_POOL

namespace gpubackprop {

using Piece = void (*)(const void* context, long long piece);

// piece(context, i) for i = 0 … pieces − 1, each once, in any order, on all cores that are free to.
void on_all_cores(long long pieces, Piece piece, const void* context);

// body(i) for i = 0 … pieces − 1; on all cores if it is worth it.
template <typename Body>
static inline void each(long long pieces, bool worth, const Body& body) {
    if (worth) {
        on_all_cores(pieces, [](const void* context, long long i) { (*static_cast<const Body*>(context))(i); }, &body);
    } else {
        for (long long i = 0; i < pieces; ++i) body(i);
    }
}

}  // namespace gpubackprop

#endif

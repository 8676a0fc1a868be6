// Threads of our own, which share a piece of work with the thread that has it.
#ifndef GPUBACKPROP_POOL
#define GPUBACKPROP_POOL

namespace gpubackprop {

using Piece = void (*)(const void* context, long long piece);

// piece(context, i) for i = 0 … pieces − 1, each once, in any order: by the caller, and by helpers that are free to.
// The caller takes what no helper has begun, so that it waits only for a helper that is within a piece.
void share(long long pieces, Piece piece, const void* context);

// body(i) for i = 0 … pieces − 1; with helpers if it is worth it.
template <typename Body>
static inline void each(long long pieces, bool worth, const Body& body) {
    if (worth && pieces > 1) {
        share(pieces, [](const void* context, long long i) { (*static_cast<const Body*>(context))(i); }, &body);
    } else {
        for (long long i = 0; i < pieces; ++i) body(i);
    }
}

// How many threads share the work of this one.
int sharers();

// While one of these lives, in any thread, BLAS computes each product in the thread that asks for it.
struct OneBlasThread {
    OneBlasThread();
    ~OneBlasThread();
    OneBlasThread(const OneBlasThread&) = delete;
};

}  // namespace gpubackprop

#endif

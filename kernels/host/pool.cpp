// The threads behind pool.h, and what a caller asks of the library as a whole.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gpubackprop {
namespace {

struct Pool {
    std::mutex mutex;
    std::condition_variable wake;
    int threads = 0;
    // the work in hand, and which it is
    Piece piece = nullptr;
    const void* context = nullptr;
    long long pieces = 0;
    unsigned long long number = 0;
    bool open = false;  // threads that wake may still join
    std::atomic<long long> next{0};
    std::atomic<int> busy{0};

    void claim(Piece p, const void* c, long long n) {
        for (long long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) p(c, i);
    }

    void work() {
        unsigned long long seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return open && number != seen; });
            seen = number;
            busy.fetch_add(1, std::memory_order_relaxed);
            const Piece p = piece;
            const void* const c = context;
            const long long n = pieces;
            lock.unlock();
            claim(p, c, n);
            busy.fetch_sub(1, std::memory_order_release);
            lock.lock();
        }
    }

    void start(int wanted) {
        for (; threads < wanted; ++threads) std::thread([this] { work(); }).detach();
    }

    void run(long long n, Piece p, const void* c) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            piece = p, context = c, pieces = n, ++number, open = true;
            next.store(0, std::memory_order_relaxed);
        }
        wake.notify_all();
        claim(p, c, n);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            open = false;
        }
        while (busy.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }
};

Pool* pool = new Pool;  // never deleted: its threads may outlive everything
std::atomic_flag taken = ATOMIC_FLAG_INIT;
std::atomic<int> cores{1};

void after_fork() {  // a child has no threads but the one that forked
    pool = new Pool;
    taken.clear();
}

}  // namespace

void on_all_cores(long long pieces, Piece piece, const void* context) {
    const int helpers = cores.load(std::memory_order_relaxed) - 1;
    if (helpers < 1 || taken.test_and_set(std::memory_order_acquire)) {  // another thread's work has the pool
        for (long long i = 0; i < pieces; ++i) piece(context, i);
        return;
    }
    pool->start(helpers);
    pool->run(pieces, piece, context);
    taken.clear(std::memory_order_release);
}

}  // namespace gpubackprop

// What formulas and sources this library was made of.
EXPORT const char* gpubackprop_digest() { return DIGEST; }

// The best instruction set of this machine.
EXPORT const char* gpubackprop_instruction_set() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return "avx512";
    }
    if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
    return "base";
}

// From now on this many cores are used.
EXPORT void gpubackprop_use_cores(int count) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, gpubackprop::after_fork); });
    gpubackprop::cores.store(count);
}

// Kernels and their jobs, in turn: (kernel, job) pairs.
EXPORT void gpubackprop_run(const long long* pairs, long long count) {
    using Kernel = void (*)(const long long*);
    for (long long i = 0; i < count; ++i) {
        reinterpret_cast<Kernel>(pairs[2 * i])(reinterpret_cast<const long long*>(pairs[2 * i + 1]));
    }
}

// The threads behind pool.h, and what a caller asks of the library as a whole.
#include "pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gpubackprop {
namespace {

std::atomic<int> cores{1};  // that may be used

int current_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// The cores that the caller may use, those after its own first; empty where the system does not say.
std::vector<int> allowed_cores() {
    std::vector<int> found;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        const int here = current_core();
        for (int i = 1; i <= CPU_SETSIZE; ++i) {
            const int core = (here + i) % CPU_SETSIZE;
            if (CPU_ISSET(core, &set)) found.push_back(core);
        }
    }
#endif
    return found;
}

// A thread that stays on one core. Left to the system it is woken on the caller's own core while BLAS's threads, which
// spin for a while after a product, hold the others: it would start when the caller is done.
struct Worker {
    int core;  // -1: any
    std::condition_variable wake;
    bool called = false;

    explicit Worker(int on) : core(on) {}

    void stay() const {
#ifdef __linux__
        if (core < 0) return;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(core, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a core that is taken away meanwhile: any, then
#endif
    }
};

struct Pool {
    std::mutex mutex;
    std::vector<int> allowed;
    std::vector<Worker*> workers;  // one on each core that is allowed, then on any
    // the work in hand
    Piece piece = nullptr;
    const void* context = nullptr;
    long long pieces = 0;
    bool open = false;  // threads that wake may still join
    std::atomic<long long> next{0};
    std::atomic<int> busy{0};

    void claim(Piece p, const void* c, long long n) {
        for (long long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) p(c, i);
    }

    void work(Worker& me) {
        me.stay();
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            me.wake.wait(lock, [&] { return me.called; });
            me.called = false;
            if (!open) continue;
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

    // One more than help: the one on the caller's core sleeps on. Where the system gives no more threads, fewer help.
    void start(size_t wanted) {
        if (workers.empty()) allowed = allowed_cores();
        while (workers.size() < wanted) {
            const size_t i = workers.size();
            auto worker = std::make_unique<Worker>(i < allowed.size() ? allowed[i] : -1);
            try {
                std::thread([this, me = worker.get()] { work(*me); }).detach();
            } catch (const std::system_error&) {
                cores.store(int(i) + 1);
                return;
            }
            workers.push_back(worker.release());
        }
    }

    void run(int helpers, long long n, Piece p, const void* c) {
        const int here = current_core();
        {
            const std::lock_guard<std::mutex> lock(mutex);
            start(size_t(helpers) + 1);
            piece = p, context = c, pieces = n, open = true;
            next.store(0, std::memory_order_relaxed);
            int left = helpers;
            for (Worker* worker : workers) {
                if (worker->core == here && here >= 0) continue;
                if (left-- == 0) break;
                worker->called = true;
                worker->wake.notify_one();
            }
        }
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
    pool->run(helpers, pieces, piece, context);
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

// The threads behind pool.h, and what a caller asks of the library as a whole.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gpubackprop {
namespace {

std::atomic<int> threads{1};        // that share work
thread_local int threads_here = 0;  // the same for the work of this thread, if not 0
thread_local int keeps_here = 0;    // times that this thread keeps BLAS to one

// ---- time -----------------------------------------------------------------------------------------------------------

using Nanoseconds = long long;
constexpr Nanoseconds MICROSECOND = 1000, MILLISECOND = 1000000;
constexpr Nanoseconds AWAKE = 500 * MICROSECOND;    // that a helper looks for more work before it sleeps
constexpr Nanoseconds HELD_UP = 250 * MICROSECOND;  // by which one sees that a thread had no core
constexpr Nanoseconds ALONE[2] = {MILLISECOND, 64 * MILLISECOND};  // that callers then work without helpers
constexpr Nanoseconds SOON = 32 * MILLISECOND;      // after which it is longer, if it comes again

Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// ---- the pool -------------------------------------------------------------------------------------------------------

// Pieces that one thread begins with: the same ones of the same work every time, which lie in its cache.
struct alignas(64) Range {
    std::atomic<long long> next{0};
    long long end = 0;
};

struct Helper {
    int number;  // from 1 on; the caller is 0
    std::condition_variable wake;
    std::atomic<bool> asleep{false};

    explicit Helper(int i) : number(i) {}
};

struct Pool {
    std::mutex mutex;
    std::vector<Helper*> helpers;
    std::atomic<bool> taken{false};  // by a caller
    std::atomic<Nanoseconds> alone_until{0}, alone_for{0};  // the cores are busy with other things
    // the work in hand
    Piece piece = nullptr;
    const void* context = nullptr;
    Range* ranges = nullptr;           // of the caller and each helper
    int sharers = 0;                   // that have one
    std::atomic<long long> ticket{0};  // of the work; odd while helpers may join
    std::atomic<int> busy{0};          // helpers that have

    // Its own range, then what is left of the others'; how many pieces.
    long long claim(int me) {
        long long done = 0;
        for (int k = 0; k < sharers; ++k) {
            Range& range = ranges[(me + k) % sharers];
            for (long long i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end; ++done) piece(context, i);
        }
        return done;
    }

    // A helper had no core: do without for a while, and twice as long if that comes again soon.
    void note_held_up(Nanoseconds time) {
        const Nanoseconds last = alone_for.load(std::memory_order_relaxed);
        const bool again = time < alone_until.load(std::memory_order_relaxed) + SOON;
        const Nanoseconds next = again && last > 0 ? 2 * last : ALONE[0];
        alone_for.store(next < ALONE[1] ? next : ALONE[1], std::memory_order_relaxed);
        alone_until.store(time + alone_for.load(std::memory_order_relaxed), std::memory_order_relaxed);
    }

    static bool is_new(long long t, long long seen) { return t != seen && (t & 1); }

    // The ticket of work that comes soon; `seen` if none does.
    long long look(long long seen) {
        const Nanoseconds start = now();
        for (Nanoseconds last = start;;) {
            for (int i = 0; i < 32; ++i) {
                const long long t = ticket.load(std::memory_order_acquire);
                if (is_new(t, seen)) return t;
                pause();
            }
            const Nanoseconds time = now();
            if (time - last > HELD_UP) note_held_up(time);
            if (time - start > AWAKE) return seen;
            last = time;
        }
    }

    long long sleep(Helper& me, long long seen) {
        std::unique_lock<std::mutex> lock(mutex);
        me.asleep.store(true);
        long long t;
        me.wake.wait(lock, [&] { return is_new(t = ticket.load(), seen); });
        me.asleep.store(false);
        return t;
    }

    void help(Helper& me) {
        for (long long seen = 0;;) {
            long long t = look(seen);
            if (t == seen) t = sleep(me, seen);
            seen = t;
            busy.fetch_add(1);
            if (ticket.load() == t && me.number < sharers) claim(me.number);
            busy.fetch_sub(1, std::memory_order_release);
        }
    }

    // Where the system gives no more threads, fewer help.
    int start(int wanted) {
        if (int(helpers.size()) >= wanted) return wanted;
        delete[] ranges;
        ranges = new Range[size_t(wanted) + 1];
        while (int(helpers.size()) < wanted) {
            Helper* const helper = new Helper(int(helpers.size()) + 1);
            try {
                std::thread([this, helper] { help(*helper); }).detach();
            } catch (const std::system_error&) {
                delete helper;
                threads.store(int(helpers.size()) + 1);
                break;
            }
            helpers.push_back(helper);
        }
        return int(helpers.size());
    }

    void run(int wanted, long long n, Piece p, const void* c) {
        wanted = start(wanted);
        piece = p, context = c, sharers = wanted + 1;
        for (int i = 0; i < sharers; ++i) {
            ranges[i].next.store(n * i / sharers, std::memory_order_relaxed);
            ranges[i].end = n * (i + 1) / sharers;
        }
        ticket.fetch_add(1);
        for (int i = 0; i < wanted; ++i) {
            if (!helpers[size_t(i)]->asleep.load()) continue;
            const std::lock_guard<std::mutex> lock(mutex);
            helpers[size_t(i)]->wake.notify_one();
        }
        const Nanoseconds begin = now();
        const long long done = claim(0);
        ticket.fetch_add(1);
        if (busy.load() == 0) return;
        const Nanoseconds start = now(), of_a_piece = (start - begin) / (done + 1);
        for (long long i = 0; busy.load(std::memory_order_acquire) > 0; ++i) {
            if (i < 1000) pause(); else std::this_thread::yield();
        }
        const Nanoseconds end = now();
        if (end - start > HELD_UP + 2 * of_a_piece) note_held_up(end);
    }
};

Pool* pool = new Pool;  // never deleted: its threads may outlive everything

// ---- BLAS -----------------------------------------------------------------------------------------------------------

struct Blas {
    std::mutex mutex;
    int (*get)() = nullptr;
    void (*set)(int) = nullptr;
    int at_first = 0;           // threads that it had when it was met
    std::atomic<int> users{0};  // that keep it to one
    std::atomic<int> former{0};
    int products = 0;           // under way

    // Threads that it has when nobody keeps it to one.
    int count() const { return users.load() > 0 ? former.load() : get(); }

    void take() {
        if (users.load() == 0) {
            former.store(get());
            if (former.load() != 1) set(1);
        }
        users.fetch_add(1);
    }

    void enter(bool product) {
        const std::lock_guard<std::mutex> lock(mutex);
        products += product;
        take();
    }

    void leave(bool product) {
        const std::lock_guard<std::mutex> lock(mutex);
        products -= product;
        if (users.load() == 1 && former.load() != 1) set(former.load());
        users.fetch_sub(1);
    }
} blas;

}  // namespace

// As many as it was told, but no more than BLAS has where somebody lowered that.
int sharers() {
    const int told = threads_here ? threads_here : threads.load(std::memory_order_relaxed);
    if (told == 1 || blas.set == nullptr) return told;
    const int allowed = blas.count();
    return allowed < blas.at_first && allowed < told ? allowed : told;
}

OneBlasThread::OneBlasThread() {
    if (blas.set != nullptr) blas.enter(true);
}

OneBlasThread::~OneBlasThread() {
    if (blas.set != nullptr) blas.leave(true);
}

void share(long long pieces, Piece piece, const void* context) {
    const int wanted = sharers() - 1;
    const long long others = pieces - 1 < wanted ? pieces - 1 : wanted;
    const bool free = others > 0 && (pool->alone_until.load(std::memory_order_relaxed) == 0 ||
                                     now() > pool->alone_until.load(std::memory_order_relaxed));
    if (!free || pool->taken.exchange(true, std::memory_order_acquire)) {  // another thread's work has the pool
        for (long long i = 0; i < pieces; ++i) piece(context, i);
        return;
    }
    pool->run(int(others), pieces, piece, context);
    pool->taken.store(false, std::memory_order_release);
}

namespace {

// No product is under way then, whose thread would have one of BLAS's own locks, for ever in the child.
void before_fork() {
    for (blas.mutex.lock(); blas.products > 0; blas.mutex.lock()) {
        blas.mutex.unlock();
        std::this_thread::yield();
    }
}
void after_fork() { blas.mutex.unlock(); }

// A child has no threads but the one that forked.
void in_child() {
    pool = new Pool;
    if (blas.users.load() > 0 && blas.former.load() != 1) blas.set(blas.former.load());
    blas.users.store(0);
    for (int i = 0; i < keeps_here; ++i) blas.take();
    blas.products = 0;
    blas.mutex.unlock();
}

}  // namespace
}  // namespace gpubackprop

// What formulas and sources this library was made of.
EXPORT const char* gpubackprop_digest() { return DIGEST; }

// From now on so many threads share work.
EXPORT void gpubackprop_set_threads(int count) {
    static std::once_flag once;
    std::call_once(once, [] {
        pthread_atfork(gpubackprop::before_fork, gpubackprop::after_fork, gpubackprop::in_child);
    });
    gpubackprop::threads.store(count);
}

// From now on so many share the work of the calling thread, or with 0 as many as all others'; what this was before.
EXPORT int gpubackprop_set_threads_here(int count) {
    const int former = gpubackprop::threads_here;
    gpubackprop::threads_here = count;
    return former;
}

// How many share the work of the calling thread.
EXPORT int gpubackprop_get_threads() { return gpubackprop::sharers(); }

// How BLAS is asked for the number of its threads, and told.
EXPORT void gpubackprop_use_blas(int (*get)(), void (*set)(int)) {
    gpubackprop::blas.get = get;
    gpubackprop::blas.set = set;
    gpubackprop::blas.at_first = get();
}

// From now on, until as many calls of the second, BLAS computes in the thread that asks.
EXPORT void gpubackprop_enter_blas() {
    if (gpubackprop::blas.set == nullptr) return;
    ++gpubackprop::keeps_here;
    gpubackprop::blas.enter(false);
}
EXPORT void gpubackprop_leave_blas() {
    if (gpubackprop::blas.set == nullptr) return;
    --gpubackprop::keeps_here;
    gpubackprop::blas.leave(false);
}

// Kernels and their jobs, in turn: (kernel, job) pairs.
EXPORT void gpubackprop_run(const long long* pairs, long long count) {
    using Kernel = void (*)(const long long*);
    for (long long i = 0; i < count; ++i) {
        reinterpret_cast<Kernel>(pairs[2 * i])(reinterpret_cast<const long long*>(pairs[2 * i + 1]));
    }
}

// The scheduler behind emulation.h: fibers, barriers, the order of threads and blocks.
#include "emulation.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx;
dim3 blockDim;
emulation::Grid blockIdx, gridDim;

namespace emulation {
namespace {

// ---- fibers ---------------------------------------------------------------------------------------------------------

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 << 10;  // a report is written on the stack of the culprit
#else
constexpr size_t STACK = 64 << 10;
#endif

// Where a stack goes on, while another one runs; `become` leaves one for the other.
#if defined(__x86_64__) && !defined(PORTABLE)

using Context = void*;  // the stack pointer, above it what a function must preserve

extern "C" void emulation_become(Context* from, Context to);
asm(R"(
.text
.hidden emulation_become
.globl emulation_become
.type emulation_become, @function
emulation_become:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_become, . - emulation_become
)");

void become(Context& from, Context& to) { emulation_become(&from, to); }

void prepare(Context& context, char* stack, void (*body)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15));
    *--top = nullptr;  // the address that `body` would return to
    *--top = reinterpret_cast<void*>(body);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context = top;
}

#else  // asks the kernel for the signal mask at each switch: ten times slower

using Context = ucontext_t;

void become(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    makecontext(&context, body, 0);
}

#endif

struct Fiber {
    Context context;
    const void* bottom;  // of its stack
    size_t size;
    std::unique_ptr<char[]> stack;
};

Fiber caller;  // the stack that `launch` was called on
Fiber* current;

void arrived([[maybe_unused]] void* fake) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (!caller.bottom) caller.bottom = bottom, caller.size = size;
#endif
}

void switch_to(Fiber& to) {
    Fiber& from = *current;
    current = &to;
    void* fake = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake, to.bottom, to.size);
#endif
    become(from.context, to.context);
    arrived(fake);
}

// ---- threads and blocks ---------------------------------------------------------------------------------------------

struct Block;

using Turn = std::pair<uint64_t, uint64_t>;  // a thread's place in the order, and its number to tell equals apart

struct Thread {
    Block* block;
    unsigned number;  // in its block
    Turn turn{};
    Fiber* fiber = nullptr;  // since it started
    enum { READY, AT_BARRIER, AT_WARP, RETURNED } state = READY;
    Place place{};
    unsigned mask = 0;              // of the lanes it waits for
    uint64_t given = 0, taken = 0;  // in an exchange: its own value, and the same for the others to read
};

struct Block {
    emulation::Grid index;
    uint64_t number, epoch = 0;  // barriers passed
    unsigned waiting = 0, returned = 0;
    std::vector<Thread> threads;
    std::vector<char> shared;  // while another block runs
};

constexpr unsigned RESIDENT = 4;  // blocks at once, in a shuffled order

const char* name;
uint64_t order;
void (*kernel)(void* const*);
void* const* arguments;
std::vector<uint64_t> blocks;  // still to come, the next one last
std::vector<std::unique_ptr<Block>> resident;
std::map<Turn, Thread*> ready;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
Thread* running = nullptr;
Block* loaded = nullptr;  // whose shared memory is in place
std::string error;

uint64_t mixed(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Of the threads that may run, order 0 takes the first. Odd orders let warp after warp run as far as it can; even ones
// take eighths of a block, drawn thread by thread, and mix those of all resident blocks. Drawn anew at each barrier.
void make_ready(Thread& thread) {
    thread.state = Thread::READY;
    const Block& block = *thread.block;
    const uint64_t number = block.number << 10 | thread.number;
    uint64_t key = 0;
    if (order != 0) {
        const uint64_t seed = mixed(order ^ mixed(block.epoch)), of_thread = mixed(seed ^ mixed(number));
        const uint64_t group = order % 2 == 0 ? ~block.number << 3 | of_thread % 8 : number / warpSize;
        key = mixed(seed ^ mixed(group)) >> 33 << 32 | of_thread >> 32;
    }
    thread.turn = {key, number};
    ready[thread.turn] = &thread;
}

// Puts those of the block that may run behind all others.
void hold_up(Block& block) {
    for (Thread& thread : block.threads) {
        if (ready.erase(thread.turn)) {
            thread.turn.first |= uint64_t(1) << 63;
            ready[thread.turn] = &thread;
        }
    }
}

// ---- shared memory --------------------------------------------------------------------------------------------------

thread_local char anchor;  // makes the segment exist, and shows which one it is

struct Segment {
    char* start;
    size_t size;
};

int find_segment(dl_phdr_info* info, size_t, void* found) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        char* start = static_cast<char*>(info->dlpi_tls_data);
        if (header.p_type == PT_TLS && start && &anchor >= start && &anchor < start + header.p_memsz) {
            *static_cast<Segment*>(found) = {start, header.p_memsz};
            return 1;
        }
    }
    return 0;
}

// All __shared__ variables of this library; valid for the calling thread of the operating system.
Segment segment() {
    anchor = 0;
    Segment found{&anchor, 1};
    dl_iterate_phdr(find_segment, &found);
    return found;
}

Segment shared;

void load_shared(Block* block) {
    if (loaded == block) return;
    if (loaded) memcpy(loaded->shared.data(), shared.start, shared.size);
    memcpy(shared.start, block->shared.data(), shared.size);
    loaded = block;
}

// ---- scheduling -----------------------------------------------------------------------------------------------------

void admit() {
    if (blocks.empty()) return;
    const uint64_t number = blocks.back();
    blocks.pop_back();
    auto block = std::make_unique<Block>();
    block->number = number;
    block->index = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y),
                    unsigned(number / gridDim.x / gridDim.y)};
    block->shared.assign(shared.size, '\xff');  // NaN, -1, and no bool
    block->threads.resize(blockDim.x * blockDim.y * blockDim.z);
    for (unsigned i = 0; i < block->threads.size(); ++i) {
        block->threads[i].block = block.get();
        block->threads[i].number = i;
        make_ready(block->threads[i]);
    }
    resident.push_back(std::move(block));
}

void dismiss(Block* block) {
    if (loaded == block) loaded = nullptr;
    resident.erase(std::find_if(resident.begin(), resident.end(), [=](auto& b) { return b.get() == block; }));
    admit();
}

Thread* next() {
    if (ready.empty()) return nullptr;
    Thread* thread = ready.begin()->second;
    ready.erase(ready.begin());
    return thread;
}

void enter(Thread& thread) {
    running = &thread;
    const unsigned x = blockDim.x, y = blockDim.y;
    threadIdx = {thread.number % x, thread.number / x % y, thread.number / x / y};
    blockIdx = thread.block->index;
    load_shared(thread.block);
}

Thread* upcoming = nullptr;  // what an idle fiber shall begin with

void work();

Fiber& fiber_for(Thread* thread) {
    if (!thread) return caller;
    if (thread->fiber) return *thread->fiber;
    upcoming = thread;
    if (idle.empty()) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack.reset(new char[STACK]);
        fiber->bottom = fiber->stack.get();
        fiber->size = STACK;
        prepare(fiber->context, fiber->stack.get(), work);
        fibers.push_back(std::move(fiber));
        return *fibers.back();
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    return *fiber;
}

// What every fiber does: thread after thread, so that only one that has to wait costs a switch.
void work() {
    arrived(nullptr);
    for (;;) {
        Thread* thread = upcoming;
        thread->fiber = current;
        enter(*thread);
        kernel(arguments);
        Block* block = thread->block;
        thread->state = Thread::RETURNED;
        if (++block->returned == block->threads.size()) dismiss(block);
        upcoming = next();
        if (!upcoming || upcoming->fiber) {
            idle.push_back(current);
            switch_to(fiber_for(upcoming));
        }
    }
}

// Lets others run until this thread is ready and its turn comes.
void wait() {
    Thread& thread = *running;
    Thread* other = next();
    if (other != &thread) switch_to(fiber_for(other));
    enter(thread);
}

[[noreturn]] void fail(std::string what) {
    error = std::move(what);
    switch_to(caller);
    __builtin_unreachable();
}

// ---- what is said when nothing can go on ----------------------------------------------------------------------------

std::string tuple(emulation::Grid v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string described(const Thread& thread) {
    if (thread.state == Thread::RETURNED) return "returned";
    char mask[24] = "";
    if (thread.state == Thread::AT_WARP) snprintf(mask, sizeof mask, "0x%08x", thread.mask);
    return std::string("at ") + thread.place.what + "(" + mask + ") in " + thread.place.function + ", line " +
           std::to_string(thread.place.line);
}

std::string stuck(const Block& block) {
    std::vector<std::pair<std::string, std::string>> groups;  // what the threads do, which ones
    for (unsigned i = 0, first = 0; i < block.threads.size(); ++i) {
        const std::string what = described(block.threads[i]);
        if (i + 1 < block.threads.size() && described(block.threads[i + 1]) == what) continue;
        const std::string range = first == i ? std::to_string(i) : std::to_string(first) + "-" + std::to_string(i);
        first = i + 1;
        const auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == what; });
        if (group == groups.end()) {
            groups.push_back({what, range});
        } else if (group->second.back() != '.') {
            group->second += group->second.size() < 60 ? ", " + range : ", ...";
        }
    }
    std::string text = std::string(name) + ": the threads of block " + tuple(block.index) + " wait for each other";
    for (auto& [what, which] : groups) text += (&which == &groups[0].second ? ": " : "; ") + which + " " + what;
    return text;
}

void reset() {
    ready.clear();
    resident.clear();
    idle.clear();
    loaded = nullptr;
    if (error.empty()) {
        for (auto& fiber : fibers) idle.push_back(fiber.get());
    } else {
        fibers.clear();  // their stacks hold what was not unwound
    }
}

}  // namespace

// ---- what emulation.h declares --------------------------------------------------------------------------------------

void atomic() {
    Block& block = *running->block;
    if (order != 0 && mixed(order ^ mixed(block.number)) % 2 == 0) hold_up(block);
}

int lane() { return int(running->number % warpSize); }

void wait_for_block(Place place) {
    Thread& thread = *running;
    Block& block = *thread.block;
    thread.state = Thread::AT_BARRIER;
    thread.place = place;
    if (++block.waiting == block.threads.size()) {
        const bool together = std::all_of(block.threads.begin(), block.threads.end(), [&](const Thread& other) {
            return other.state == Thread::AT_BARRIER && other.place.line == place.line &&
                   !strcmp(other.place.function, place.function);
        });
        if (together) {
            block.waiting = 0;
            ++block.epoch;
            for (Thread& other : block.threads) make_ready(other);
        }
    }
    wait();
}

void wait_for_lanes(unsigned mask, Place place) {
    Thread& thread = *running;
    Thread* warp = &thread - lane();
    thread.state = Thread::AT_WARP;
    thread.place = place;
    thread.mask = mask;
    const size_t left = thread.block->threads.size() - size_t(thread.number - unsigned(lane()));
    const unsigned present = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    bool together = (mask >> lane() & 1) != 0 && (mask & ~present) == 0;
    for (unsigned rest = mask & present; together && rest; rest &= rest - 1) {
        const Thread& other = warp[__builtin_ctz(rest)];
        together = other.state == Thread::AT_WARP && other.mask == mask && other.place.line == place.line &&
                   !strcmp(other.place.function, place.function);
    }
    if (together) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            Thread& other = warp[__builtin_ctz(rest)];
            other.taken = other.given;
            make_ready(other);
        }
    }
    wait();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Place place) {
    Thread& thread = *running;
    thread.given = value;
    wait_for_lanes(mask, place);
    if (source < 0 || source >= warpSize || !(mask >> source & 1)) {
        fail(std::string(name) + ": " + place.what + " in " + place.function + ", line " + std::to_string(place.line) +
             ", reads lane " + std::to_string(source) + ", which its mask does not name");
    }
    return (&thread - lane() + source)->taken;
}

unsigned vote(unsigned mask, bool predicate, Place place) {
    Thread& thread = *running;
    thread.given = predicate;
    wait_for_lanes(mask, place);
    unsigned votes = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const int other = __builtin_ctz(rest);
        votes |= unsigned((&thread - lane() + other)->taken) << other;
    }
    return votes;
}

const char* launch(const char* name_, const Launch& how, void (*kernel_)(void* const*), void* const* arguments_) {
    name = name_, kernel = kernel_, arguments = arguments_, order = how.order;
    gridDim = how.grid, blockDim = how.block;
    shared = segment();
    error.clear();
    blocks.resize(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
    std::iota(blocks.rbegin(), blocks.rend(), uint64_t(0));
    if (order != 0) {
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[mixed(order ^ mixed(i)) % i]);
    }
    for (unsigned i = 0; i < (order == 0 ? 1 : RESIDENT); ++i) admit();
    current = &caller;
    caller.bottom = nullptr;
    switch_to(fiber_for(next()));
    if (error.empty() && !resident.empty()) error = stuck(*resident.front());
    reset();
    return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulation

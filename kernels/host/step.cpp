// What a training step does beside its formulas: the batch, dropout and noise, the norm of the gradient, the next row of the table.
#include "host.h"
#include "control.cuh"

namespace gpubackprop {
namespace {

// x, y = this step's rows of the data in the given order; y may be 0.
struct Feed {
    char *x, *y;
    const char *source_x, *source_y;
    const Index* order;
    const Steps* steps;
    Index rows, bytes_x, bytes_y;  // of a row

    void run() const {
        const Index* const from = order + steps->offsets[steps->step];
        constexpr Index HEIGHT = 16;
        each((rows + HEIGHT - 1) / HEIGHT, worth(rows * bytes_x / 4, 3), [&](Index i) {
            for (Index row = i * HEIGHT; row < rows && row < (i + 1) * HEIGHT; ++row) {
                memcpy(x + row * bytes_x, source_x + from[row] * bytes_x, size_t(bytes_x));
                if (y != nullptr) memcpy(y + row * bytes_y, source_y + from[row] * bytes_y, size_t(bytes_y));
            }
        });
    }
};

// What goes over elements with random numbers of their own: see kernels/draws.cuh.
struct Draws {
    R* out;
    const R* x;
    Index size, seed, site;
    const Steps* steps;  // or nullptr: `step`
    Index step;

    static constexpr Index BLOCKS = 256, STRETCH = 4 * BLOCKS;  // blocks of Philox, of four elements each

    // The words of the elements that begin at `first`.
    void words(Word* to, Index first, Word lane) const {
        const Word now = steps == nullptr ? Word(step) : Word(steps->first + steps->step);
        LOOP for (Index b = 0; b < BLOCKS; ++b) {
            const Block block = draw(Long(seed), Word(site) | lane, now, Long(first / 4 + b));
            for (int i = 0; i < 4; ++i) to[4 * b + i] = block.word[i];
        }
    }

    // apply(first, count) for every stretch of elements, each of which costs so much.
    template <typename Apply>
    void each_stretch(Index cost, const Apply& apply) const {
        each((size + STRETCH - 1) / STRETCH, worth(size, cost), [&](Index i) {
            const Index first = STRETCH * i;
            apply(first, size - first < STRETCH ? size - first : STRETCH);
        });
    }
};

// out (+)= x · scale where Philox keeps the element, else 0; see kernels/dropout.cu.
struct Dropout {
    Draws draws;
    Index threshold, accumulate;
    const R* scale;

    void run() const {
        draws.each_stretch(12, [&](Index first, Index count) {
            Word words[Draws::STRETCH];
            draws.words(words, first, 0);
            apply(draws.out + first, draws.x + first, words, count);
        });
    }

    void apply(R* to, const R* from, const Word* words, Index count) const {
        const bool all = threshold > 0xffffffff;  // above every word, and no Word itself
        const Word below = Word(threshold);
        const R factor = *scale;
        if (accumulate) {
            LOOP for (Index e = 0; e < count; ++e) to[e] = to[e] + ((all | (words[e] < below)) ? from[e] * factor : R(0));
        } else {
            LOOP for (Index e = 0; e < count; ++e) to[e] = (all | (words[e] < below)) ? from[e] * factor : R(0);
        }
    }
};

// out = x + sigma · N(0, 1); see kernels/noise.cu.
struct Noise {
    Draws draws;
    const R* sigma;

    void run() const {
        draws.each_stretch(40, [&](Index first, Index count) {
            R u[Draws::STRETCH], v[Draws::STRETCH];
            uniforms(u, first, 0);
            uniforms(v, first, SECOND);
            R* const to = draws.out + first;
            const R* const from = draws.x + first;
            const R factor = *sigma;
            LOOP for (Index e = 0; e < count; ++e) {
                to[e] = from[e] + factor * (sqrt(R(-2) * log(R(1) - u[e])) * cos(v[e] * TURN));
            }
        });
    }

    void uniforms(R* to, Index first, Word lane) const {
        Word high[Draws::STRETCH];
        draws.words(high, first, lane);
#ifdef FLOAT64
        Word low[Draws::STRETCH];
        draws.words(low, first, lane | LOW);
        LOOP for (Index e = 0; e < Draws::STRETCH; ++e) to[e] = uniform(high[e], low[e]);
#else
        LOOP for (Index e = 0; e < Draws::STRETCH; ++e) to[e] = uniform(high[e]);
#endif
    }
};

// From n = ‖g‖₂ / scale into control = (scale, factor, ok, good): see kernels/norm.cu.
struct Norm {
    const R* g;
    R *control, *partials;
    const R* clip;
    Index size, dynamic, growth;

    void run() const {
        const Index pieces = (size + GRAIN - 1) / GRAIN;
        each(pieces, worth(size, 2), [&](Index i) {
            const R* const from = g + i * GRAIN;
            const Index count = (i + 1) * GRAIN < size ? GRAIN : size - i * GRAIN;
            partials[i] = sum_each(count, [=](Index e) { return from[e] * from[e]; });
        });
        follow(control, sqrt(sum_of(partials, pieces)), *clip, dynamic != 0, R(growth));
    }
};

// The tally += total.
struct Loss {
    const R* total;
    Tally tally;
    const Steps* steps;
};

}  // namespace

KERNEL(feed) { reinterpret_cast<const Feed*>(job)->run(); }
KERNEL(gradient_norm) { reinterpret_cast<const Norm*>(job)->run(); }
KERNEL(dropout) { reinterpret_cast<const Dropout*>(job)->run(); }
KERNEL(noise) { reinterpret_cast<const Noise*>(job)->run(); }

KERNEL(accumulate_loss) {
    const Loss& loss = *reinterpret_cast<const Loss*>(job);
    add_to(loss.tally, *loss.total, *loss.steps);
}

// On to the next row, as far as the last; the row of the steps applied stands still where one is skipped, or job[1] is 0.
KERNEL(advance) {
    Steps& steps = *pointer<Steps>(job[0]);
    steps.step += steps.step < steps.last;
    steps.applied += job[1] != 0 && steps.control[2] != 0 && steps.applied < steps.last;
    const size_t bytes = size_t(steps.width) * sizeof(R);
    memcpy(steps.row, steps.rows + steps.step * steps.width, bytes);
    memcpy(steps.applied_row, steps.rows + steps.applied * steps.width, bytes);
}

}  // namespace gpubackprop

"""Two threads in one model, trainer or estimator: a call works or is refused, and memory is never corrupted."""

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.claims import using

REFUSED = "another thread is training this"

# Every pairing of calls on shared objects, many times, in a process of its own: a crash is then a failure.
PAIRINGS = """
import copy, faulthandler, itertools, pickle, sys, threading
import numpy as np, gpubackprop as gb
faulthandler.enable()
sys.setswitchinterval(1e-5)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(12, 3)).astype("f"), rng.integers(0, 2, 12)

def make():
    gb.prune(model := gb.mlp([3, 4, 2]), 0.5)
    one, other = (gb.Trainer(model, seed=0, device="cpu") for _ in range(2))
    state, flip = model.state_dict(), itertools.count()
    return one, model, {
        "fit": lambda: one.fit(x, y, epochs=1, batch_size=5, progress=False),
        "fit by another trainer": lambda: other.fit(x, y, epochs=1, batch_size=5, progress=False),
        "predict": lambda: model.predict(x),
        "evaluate": lambda: one.evaluate(x, y),
        "load_state_dict": lambda: model.load_state_dict(state),
        "to": lambda: model.to(("cpu", "cpu:reference")[next(flip) % 2]),
        "prune": lambda: gb.prune(model, 0.5),
        "pickle a trainer": lambda: pickle.dumps(one),
        "copy a model": lambda: copy.deepcopy(model),
        "plan": lambda: one.plan(5),
    }

def attempt(call, wrong):
    try:
        call()
    except RuntimeError as error:
        if "another thread is" not in str(error):
            wrong.append(repr(error))
    except BaseException as error:
        wrong.append(repr(error))

names = list(make()[2])
for a, b in itertools.combinations_with_replacement(names, 2):
    trainer, model, calls = make()
    barrier, wrong = threading.Barrier(2), []
    def work(name):
        for _ in range(ROUNDS):
            barrier.wait()
            attempt(calls[name], wrong)
    threads = [threading.Thread(target=work, args=(n,)) for n in (a, b)]
    [t.start() for t in threads], [t.join() for t in threads]
    lengths = {len(v) for v in trainer.history.values()} | {trainer.epoch}
    assert not wrong, (a, b, wrong[:3])
    assert not trainer.history or len(lengths) == 1, (a, b, lengths)
    calls["fit"]()
    assert np.isfinite(model.predict(x)).all(), (a, b)
"""


def test_every_pairing_of_calls_in_two_threads_works_or_is_refused():
    code = PAIRINGS.replace("ROUNDS", "100")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_call_sees_the_weights_of_one_moment():
    sys.setswitchinterval(1e-6)
    try:
        x, model = np.random.default_rng(0).normal(size=(64, 4)), gb.mlp([4, *[8] * 6, 3]).initialize(0)
        states = [model.state_dict(), {k: 2 * v + 1 for k, v in model.state_dict().items()}]
        known, done = [], threading.Event()
        for state in states:
            model.load_state_dict(state)
            known.append(model(x).numpy().tobytes())

        def swap():
            while not done.is_set():
                for state in states:
                    model.load_state_dict(state)

        thread = threading.Thread(target=swap)
        thread.start()
        seen = {model(x).numpy().tobytes() for _ in range(60)}
        done.set()
        thread.join()
        assert seen <= {*known}
    finally:
        sys.setswitchinterval(0.005)


@pytest.fixture
def trained_elsewhere(rng):
    """A trainer in whose callback another thread may act, and what that thread did."""
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 2, 20)
    trainer = gb.Trainer(gb.mlp([3, 4, 2]), seed=0)

    def act(call):
        caught = []

        def work():
            try:
                call()
            except BaseException as error:
                caught.append(error)

        def callback(_):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

        trainer.fit(x, y, epochs=1, callbacks=[callback])
        return caught[0] if caught else None

    return trainer, x, y, act


@pytest.mark.parametrize("name, call", [
    ("fit", lambda t, x, y: t.fit(x, y, epochs=1)),
    ("Trainer", lambda t, x, y: gb.Trainer(t.model)),
    ("predict", lambda t, x, y: t.model.predict(x)),
    ("predict", lambda t, x, y: t.model.predict_classes(x)),
    ("predict", lambda t, x, y: t.model.layers[0].predict(x)),
    ("predict", lambda t, x, y: gb.Sequential(t.model, gb.Dense(2, 2)).predict(x)),
    ("call", lambda t, x, y: t.model(x)),
    ("evaluate", lambda t, x, y: t.evaluate(x, y)),
    ("plan", lambda t, x, y: t.plan(4)),
    ("use", lambda t, x, y: t.use("sgd")),
    ("to", lambda t, x, y: t.model.to("cpu:reference")),
    ("initialize", lambda t, x, y: t.model.initialize(1)),
    ("state_dict", lambda t, x, y: t.model.state_dict()),
    ("load_state_dict", lambda t, x, y: t.model.load_state_dict({})),
    ("prune", lambda t, x, y: gb.prune(t.model, 0.5)),
    ("rewind", lambda t, x, y: gb.rewind(t.model, {})),
    ("lsuv", lambda t, x, y: gb.lsuv(t.model, x)),
    ("pickle", lambda t, x, y: copy.deepcopy(t)),
    ("pickle", lambda t, x, y: copy.deepcopy(t.model)),
    ("save_model", lambda t, x, y: gb.save_model(t.model, "never.safetensors")),
])  # fmt: skip
def test_a_call_on_a_model_that_another_thread_trains_is_refused_at_once(trained_elsewhere, name, call, tmp_path):
    trainer, x, y, act = trained_elsewhere
    error = act(lambda: call(trainer, x, y))
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(f"{name}: {REFUSED} model")
    assert len(trainer.history["loss"]) == 1
    call(trainer, x, y) if name in ("fit", "predict", "evaluate", "state_dict") else trainer.fit(x, y, epochs=1)


def test_training_waits_for_a_prediction_and_two_models_train_at_once(rng):
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 2, 20)
    trainer, began = gb.Trainer(gb.mlp([3, 4, 2]), seed=0), threading.Event()
    thread = threading.Thread(target=lambda: (began.set(), trainer.fit(x, y, epochs=2)))
    with using("predict", trainer.model.shared()):
        thread.start()
        began.wait()
        gb.Trainer(gb.mlp([3, 2]), seed=0).fit(x, y, epochs=2)
        assert trainer.epoch == 0
    thread.join()
    assert trainer.epoch == 2


def test_two_threads_that_each_use_what_the_other_has_do_not_wait_for_ever():
    a, b = [object()], [object()]
    has, caught = threading.Event(), []

    def other():
        with using("predict", b):
            has.set()
            try:
                with using("predict", a):
                    pass
            except RuntimeError as error:
                caught.append(error)

    thread = threading.Thread(target=other)
    with using("predict", a):
        thread.start()
        has.wait()
        thread.join(5)
        assert not thread.is_alive()
    assert "call it on its own" in str(caught[0])


def test_a_callback_may_use_the_model_but_not_train_it(rng):
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 2, 20)
    trainer = gb.Trainer(gb.mlp([3, 4, 2]), seed=0)
    seen = []
    trainer.fit(x, y, epochs=1, callbacks=[
        lambda t: seen.append((t.evaluate(x, y), t.predict(x), t.model.state_dict(), copy.deepcopy(t).plan(4)))
    ])  # fmt: skip
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="a callback cannot call fit"):
        trainer.fit(x, y, epochs=1, callbacks=[lambda t: gb.Trainer(t.model).fit(x, y, epochs=1)])
    assert np.isfinite(trainer.fit(x, y, epochs=1)["loss"]).all()


ESTIMATORS = """
import faulthandler, itertools, pickle, sys, threading, warnings
import numpy as np
from gpubackprop.sklearn import MLPClassifier
faulthandler.enable()
warnings.simplefilter("ignore")
sys.setswitchinterval(1e-5)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)

calls = {
    "fit": lambda m: m.fit(x, y),
    "fit to text": lambda m: m.fit(x, np.array(["no", "yes"])[y]),
    "partial_fit": lambda m: m.partial_fit(x, y) if m.classes_.dtype.kind == "i" else None,
    "predict_proba": lambda m: m.predict_proba(x),
    "predict": lambda m: m.predict(x),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).predict(x),
}
for a, b in itertools.combinations_with_replacement(calls, 2):
    m = MLPClassifier((4,), max_iter=2, random_state=0).fit(x, y)
    barrier, wrong = threading.Barrier(2), []
    def work(name):
        for _ in range(ROUNDS):
            barrier.wait()
            try:
                calls[name](m)
            except RuntimeError as error:
                if "another thread is" not in str(error):
                    wrong.append(repr(error))
            except BaseException as error:
                wrong.append(repr(error))
    threads = [threading.Thread(target=work, args=(n,)) for n in (a, b)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong, (a, b, wrong[:3])
    assert m.predict_proba(x).shape == (12, 2) and set(m.predict(x)) <= set(m.classes_), (a, b)
"""


def test_every_pairing_of_an_estimators_calls_works_or_is_refused():
    code = ESTIMATORS.replace("ROUNDS", "100")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

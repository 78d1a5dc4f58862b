"""What a spec with errors is told: the key, what was given, what is allowed, and the line."""

import pytest
from specs import HEAD, RUN

from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.errors import suggestion
from gradflow.study.spec.load import SpecError, load_study

WRONG = """\
name = "Bad Name"
titel = "x"
[data]
source = "whiten"
target = [[1.0]]
[network]
init = "weights"
weights = [[[2.0]], [[0.1, "a"]]]
[[run]]
name = "a"
dynamics = { kind = "GradientDescent", stepsize = 0.05 }
regularizers = [
  { kind = "LabelNoise", std = 0.5 },
  { kind = "WeightDecay", rate = -1 },
  { kind = "LabelNois" },
]
t1 = inf
[[run]]
dynamics = "GradientFlow"
replicas = 1.5
[[claim]]
sentence = "x"
quantity = "ratee"
run = "a"
[[claim]]
sentence = "x"
quantity = "rate"
run = "a"
expected = "predicted"
tolerance = true
"""

GOLDEN = f"""\
spec.toml:1: name: got "Bad Name"; allowed: a name of lower-case letters, digits, _ and - (it names files)
spec.toml:2: titel: unknown key; did you mean "title"? allowed here: name, title, description, seed, eps, data, datasets, network, networks, run, orders, figure, claim, short
spec.toml:4: data.source: got "whiten"; did you mean "whitened"? allowed: whitened, moments, file, sklearn
spec.toml:8: network.weights[1][0][1]: got "a"; allowed: a number
spec.toml:11: run "a", dynamics.step_size: is missing; give h > 0, flow time per step; or a schedule: a function of the step number that gives h_k >= 0, as optax makes them (a warm-up from 0, a decay to 0), or {{ name = "...", ... }} for a function of optax
spec.toml:11: run "a", dynamics.stepsize: unknown key; did you mean "step_size"? allowed here: kind, step_size, momentum, nesterov, decay, optimizer, velocity, path_substeps
spec.toml:14: run "a", regularizers[1].rate: must be a finite number >= 0; got -1.0
spec.toml:15: run "a", regularizers[2].kind: got "LabelNois"; did you mean "LabelNoise"? allowed: DropConnect, Dropout, GradientNoise, InputNoise, LabelNoise, Minibatch, WeightDecay, WeightNoise
spec.toml:17: run "a", t1: got Infinity; allowed: the flow time to reach, a number > 0
spec.toml:18: run 2, name: is missing; give a name of lower-case letters, digits, _ and - (it names files)
spec.toml:19: run 2, dynamics: got "GradientFlow"; allowed: a table with the key kind
spec.toml:20: run 2, replicas: got 1.5; allowed: a whole number >= 1
spec.toml:23: claim 1, quantity: got "ratee"; did you mean "rate"? allowed: {", ".join(CLAIMS)}
spec.toml:30: claim 2, tolerance: got true; allowed: the largest |measured - expected| / |expected|, a number >= 0
"""  # noqa: E501


def test_all_errors_are_reported_at_once(errors):
    assert errors(WRONG) == GOLDEN.splitlines()


def test_errors_between_keys_are_reported_at_once(errors):
    text = (
        'name = "test"\n[datasets.one]\nsource = "whitened"\ntarget = [[1.0]]\n[networks.small]\n'
        'init = "balanced"\nwidths = [1, 1, 1]\n'
        '[[run]]\nname = "a"\ndynamics = { kind = "GradientFlow" }\nnetwork = "smal"\n'
        'steps = 10\nsave = { points = 5, times = [2.0, 1.0] }\nobservables = ["los"]\n'
        '[[run]]\nname = "a"\ndata = "one"\nnetwork = "small"\n'
        'dynamics = { kind = "GradientDescent", step_size = 0.1 }\n'
    )
    observables = errors(text)[-3].partition("allowed: ")[2]
    assert errors(text) == [
        "spec.toml:5: networks.small.seed: is missing; without a target the end-to-end matrix is "
        "random, so give a seed",
        'spec.toml:8: run "a": has no data; give data = one of one',
        'spec.toml:11: run "a", network: got "smal"; did you mean "small"? [networks] has: small',
        'spec.toml:12: run "a", steps: got 10; GradientFlow has no steps, give t1',
        'spec.toml:13: run "a", save: needs either points (with spacing) or times',
        'spec.toml:13: run "a", save.times: got [2.0, 1.0]; allowed: increasing flow times >= 0',
        'spec.toml:14: run "a", observables[0]: got "los"; did you mean "loss"? '
        f"allowed: {observables}",
        'spec.toml:15: run "a": has no length; give t1 (flow time) or steps',
        'spec.toml:16: run "a", name: got "a" again; allowed: a name that no other run has',
    ]
    assert "imbalance" in observables.split(", ")


KEYS = (
    "sentence, quantity, expected, tolerance, absolute_tolerance, standard_errors, resolution, "
    "at_most, at_least, short"
)
CLAIM = '[[claim]]\nsentence = "x"\nrun = "flow"\n'


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            'quantity = "final"\nat_most = 1.0',
            "claim 1, observable: is missing; give an observable the run records",
        ),
        (
            'quantity = "final"\nobservable = "sharpness"\nat_most = 1.0',
            'claim 1, observable: got "sharpness"; run "flow" records: loss, excess_loss, '
            "imbalance, squared_norms",
        ),
        (
            'quantity = "rate"',
            "claim 1: has no check; give expected (with a tolerance), at_most or at_least",
        ),
        (
            'quantity = "rate"\nexpected = 1.0',
            "claim 1, expected: needs tolerance, absolute_tolerance or standard_errors beside it",
        ),
        (
            'quantity = "rate"\nexpected = 1.0\ntolerance = 0.1\nat_most = 2.0',
            "claim 1, expected: stands beside at_most or at_least; give only one kind of check",
        ),
        (
            'quantity = "rate"\nexpected = "predictd"\ntolerance = 0.1',
            'claim 1, expected: got "predictd"; did you mean "predicted"? '
            "allowed: a number, predicted",
        ),
        (
            'quantity = "drift_ratio"\nexpected = "predicted"\ntolerance = 0.1',
            'claim 1, expected: got "predicted"; allowed: a number',
        ),
        (
            'quantity = "rate"\nexpected = 0\nstandard_errors = 3',
            "claim 1, expected: is 0, so standard_errors alone cannot tell agreement from "
            "ignorance; give resolution, the largest deviation that still counts as a decision",
        ),
        (
            'quantity = "rate"\nexpected = 0.0\ntolerance = 0.1',
            "claim 1, tolerance: is relative to expected = 0; give absolute_tolerance",
        ),
        (
            'quantity = "rate"\nwindow = [2.0, 1.0]\nat_most = 1.0',
            "claim 1, window: got [2.0, 1.0]; allowed: [start, stop], start < stop",
        ),
        (
            'quantity = "separation"\ncomponent = [0]\nat_least = 1.0',
            f"claim 1, component: unknown key; allowed here: {KEYS}, run, runs, theory",
        ),
        (
            'quantity = "difference"\nobservable = "loss"\nat_most = 1.0',
            "claim 1, run: got 1; difference is about 2 runs",
        ),
        (
            'quantity = "predicted_ratio"\nat_most = 1.0',
            "claim 1, of: is missing; give the quantity an exponent or ratio is about",
        ),
        (
            'quantity = "predicted_ratio"\nof = "final"\nat_most = 1.0',
            'claim 1, of: got "final"; allowed: rate, drift, optimization_end, '
            "optimization_rate, separation",
        ),
        (
            'quantity = "rate"\ntheory = "leading_order"\nat_most = 1.0',
            'claim 1, theory: has a meaning only beside expected = "predicted"',
        ),
        (
            'quantity = "rate"\ntheory = "leading"\nexpected = "predicted"\ntolerance = 0.1',
            'claim 1, theory: got "leading"; did you mean "leading_order"? '
            "allowed: leading_order, finite_step",
        ),
        (
            'quantity = "separation"\nwindow = [0.0, 1.0]\ntheory = "finite_step"\nat_most = 1.0',
            f"claim 1, window: unknown key; allowed here: {KEYS}, run, runs, theory",
        ),
        (
            'quantity = "max_change"\nobservable = "loss"\ntheory = "finite_step"\nat_most = 1.0',
            f"claim 1, theory: unknown key; allowed here: {KEYS}, run, runs, observable, component",
        ),
        (
            'quantity = "component_ratio"\nobservable = "squared_norms"\ncomponent = [1]\n'
            "at_most = 1.0",
            "claim 1, over: is missing; give indices of the entry of the observable to divide by",
        ),
        (
            'quantity = "displacement_ratio"\nobservable = "loss"\nat_most = 1.0',
            "claim 1, run: got 1; displacement_ratio is about 2 runs",
        ),
        (
            'quantity = "speed_up"\nobservable = "loss"\nat_least = 1.0',
            f"claim 1, observable: unknown key; allowed here: {KEYS}, run, runs",
        ),
        (
            'quantity = "gd_identity"\nat_most = 1.0',
            'claim 1, run: run "flow" is not plain GradientDescent; gd_identity holds only there',
        ),
    ],
)
def test_claims_that_cannot_be_checked(errors, claim, message):
    found = errors(HEAD + RUN + CLAIM + claim + "\n")
    assert message in [line.split(": ", 1)[1] for line in found]


def test_a_run_that_does_not_exist(errors):
    (message,) = errors(
        HEAD + RUN + CLAIM.replace("flow", "flo") + 'quantity = "rate"\nat_most = 1'
    )
    assert message == 'spec.toml:14: claim 1, run: got "flo"; did you mean "flow"? runs: flow'


def test_figures_and_short_name_runs_and_observables(errors):
    text = (
        HEAD + RUN + '[[figure]]\nkind = "time_series"\nobservables = ["sharpness"]\n'
        'runs = ["glow"]\ny_scale = ["log", "log"]\n[short.runs.flaw]\nt1 = 0.5\n'
        "[short.runs.flow]\nsteps = 3\n"
    )
    assert errors(text) == [
        'spec.toml:15: figure 1, runs[0]: got "glow"; did you mean "flow"? runs: flow',
        "spec.toml:16: figure 1, y_scale: got 2 scales for 1 observables",
        'spec.toml:17: short.runs.flaw: got "flaw"; did you mean "flow"? runs: flow',
        'spec.toml:20: short.runs.flow.steps: run "flow" is as long as its t1; override that',
    ]


def test_keys_that_another_quantity_does_not_use(errors):
    claim = CLAIM + 'quantity = "predicted_ratio"\nof = "optimization_end"\nat_most = 1\n'
    assert errors(HEAD + RUN + claim + "window = [0.0, 1.0]\n") == [
        "spec.toml:18: claim 1, window: optimization_end does not use window; leave it out"
    ]
    figure = '[[figure]]\nkind = "scaling"\nparameter = "rtol"\nquantity = "{}"\n'
    final, end = figure.format("final"), figure.format("optimization_end")
    assert errors(HEAD + RUN + final + end + 'component = [0]\nobservable = "loss"\n') == [
        "spec.toml:12: figure 1: final needs an observable",
        "spec.toml:20: figure 2, component: optimization_end does not use component; leave it out",
        "spec.toml:21: figure 2, observable: optimization_end takes no observable; leave it out",
    ]
    (wrong,) = errors(HEAD + RUN + figure.format("finall"))
    assert wrong.startswith('spec.toml:15: figure 1, quantity: got "finall"; did you mean "final"?')
    assert "optimization_rate" in wrong and "exponent" not in wrong


def test_an_exponent_measures_a_quantity_with_its_needs(errors):
    text = HEAD + RUN + RUN.replace('"flow"', '"other"') + (
        '[[claim]]\nsentence = "x"\nruns = ["flow", "other"]\nquantity = "exponent"\n'
        'of = "noether_decay"\nparameter = "rtol"\nat_most = 1\n'
    )  # fmt: skip
    found = errors(text)
    for name in ("flow", "other"):
        message = f'run "{name}" is not GradientDescent; noether_decay holds only there'
        assert f"spec.toml:18: claim 1, runs: {message}" in found


def test_an_exponent_needs_different_parameters(errors):
    dynamics = '{{ kind = "GradientDescent", step_size = 0.1 }}'
    run = f'[[run]]\nname = "{{}}"\nt1 = 1\ndynamics = {dynamics}\n'
    claim = (
        '[[claim]]\nsentence = "x"\nruns = ["a", "b"]\nquantity = "exponent"\nof = "final"\n'
        'observable = "loss"\nparameter = "{}"\nat_most = 1\n'
    )
    text = HEAD + run.format("a") + run.format("b")
    assert errors(text + claim.format("step_size")) == [
        "spec.toml:22: claim 1, parameter: step_size is the same in all runs; an exponent needs "
        "different values"
    ]
    assert errors(text + claim.format("stepsize")) == [
        'spec.toml:22: claim 1, parameter: got "stepsize"; did you mean "step_size"? '
        'run "a" has: step_size, path_substeps'
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = = 2\n", "spec.toml:2: not valid TOML: Invalid value (at line 2, column 5)"),
        ("run = 3\n", "spec.toml:1: name: is missing; give a name of lower-case letters"),
        ("name = 3\n", "spec.toml:1: name: got 3; allowed: a name of lower-case letters"),
        ("", "spec.toml:1: name: is missing"),
        ("data = 3\n", "spec.toml:1: data: got 3; allowed: a table with the key source"),
        (
            "[networks]\nx = 3\n",
            "spec.toml:2: networks.x: got 3; allowed: a table with the key init",
        ),
        ('[networks."A b"]\n', "spec.toml:1: networks.A b: got"),
        ("[data]\n", "spec.toml:1: data.source: is missing; allowed: whitened, moments"),
        (
            "[short]\nduration = 2\n",
            "spec.toml:2: short.duration: got 2; allowed: a factor in (0, 1]",
        ),
    ],
)
def test_malformed_texts(errors, text, message):
    assert any(line.startswith(message) for line in errors(text)), errors(text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml: cannot be read"):
        load_study(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes('title = "Größe"'.encode("latin-1"))
    with pytest.raises(SpecError, match="is not UTF-8 text"):
        load_study(tmp_path / "latin.toml")


def test_errors_of_normals(errors):
    text = HEAD + RUN + 'replicas = 2\nnormals = { antithetic = 1, law = "gauss", prec = "x" }\n'
    assert errors(text) == [
        'spec.toml:13: run "flow", normals.law: got "gauss"; did you mean "gaussian"? allowed: '
        "gaussian, two-point, three-point",
        'spec.toml:13: run "flow", normals.antithetic: got 1; allowed: true (replicas in pairs of '
        "opposite normals) or false",
        'spec.toml:13: run "flow", normals.prec: unknown key; did you mean "precision"? allowed '
        "here: law, antithetic, precision",
    ]
    claim = CLAIM + 'quantity = "final"\nobservable = "loss"\nexpected = 1\nstandard_errors = 3\n'
    text = HEAD + RUN + "replicas = 2\nnormals = { antithetic = true }\n" + claim
    assert errors(text) == [
        'spec.toml:20: claim 1, standard_errors: run "flow" has 2 replicas; standard errors need '
        "at least 4 antithetic ones"
    ]


def test_windows_line_ends_do_not_move_lines(errors):
    assert errors(WRONG.replace("\n", "\r\n")) == GOLDEN.splitlines()


def test_a_valid_spec_and_its_defaults(load):
    spec = load(HEAD + RUN).spec
    (run,) = spec.run
    assert (run.title, run.save.points, run.save.spacing, run.replicas) == (
        "flow",
        101,
        "lin",
        None,
    )
    assert spec.data_of(run) == spec.data and spec.network_of(run) == spec.network


def test_options_change_the_spec(load):
    text = (
        HEAD
        + RUN.replace("t1 = 1.0", "t1 = 1.0\nreplicas = 100\nsave = { times = [0.5, 1.0] }")
        + RUN.replace("flow", "other")
        + CLAIM
        + 'quantity = "rate"\nat_most = 1\nshort = false\n'
        + CLAIM
        + 'quantity = "rate"\nat_most = 1\n'
        + "[short]\nreplicas = 8\npoints = 11\nduration = 0.5\n[short.runs.other]\nt1 = 0.25\n"
    )
    full, short = load(text).spec, load(text, short=True, seed=7).spec
    assert full.run[0].replicas == 100 and len(full.claim) == 2 and full.seed == 0
    assert short.seed == 7 and len(short.claim) == 1
    assert short.run[0].replicas == 8 and short.run[0].t1 == 0.5
    assert short.run[0].save.times == [0.25, 0.5]
    assert short.run[1].replicas is None and short.run[1].t1 == 0.25
    assert short.run[1].save.points == 11


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("SGD", "GradientDescent"),
        ("GD", "GradientDescent"),
        ("sgd", "GradientDescent"),
        ("gradient_descent", "GradientDescent"),
        ("Langevin", "StochasticFlow"),
        ("SDE", "StochasticFlow"),
        ("label_noise", "LabelNoise"),
        ("weight_decay", "WeightDecay"),
        ("L2", "WeightDecay"),
    ],
)
def test_names_of_other_tools_are_understood(given, meant):
    allowed = ("GradientDescent", "GradientFlow", "StochasticFlow", "LabelNoise", "WeightDecay")
    assert suggestion(given, allowed) == f'did you mean "{meant}"? '
    assert suggestion("momentum", ("momentun", "decay")) == 'did you mean "momentun"? '
    assert suggestion("quantum", allowed) == ""


def test_what_a_class_says_stands_at_the_key_it_names(errors):
    text = HEAD + RUN.replace(
        '{ kind = "GradientFlow" }',
        '{ kind = "GradientDescent", step_size = 0.1, decay = "{x}" }',
    )
    assert errors(text) == [
        "spec.toml:10: run \"flow\", dynamics.decay: must be 'coupled' or 'decoupled'; got '{x}'"
    ]

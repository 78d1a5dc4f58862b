"""From tables to objects: every kind, and errors with the line of the table that is wrong."""

import jax
import numpy as np
import pytest
from specs import HEAD, RUN

import gradflow as gf
from gradflow.study.run.build import prepare, run_key
from gradflow.study.spec.load import SpecError


def built(load, text):
    return prepare(load(text)).runs


def dynamics_of(load, table):
    text = HEAD + RUN.replace('{ kind = "GradientFlow" }', table)
    return built(load, text)[0].dynamics


def test_dynamics(load):
    flow = dynamics_of(load, '{ kind = "GradientFlow", rtol = 1e-6, stiff = true }')
    assert isinstance(flow, gf.GradientFlow) and flow.stiff
    descent = dynamics_of(load, '{ kind = "GradientDescent", step_size = 0.1, momentum = 0.5 }')
    assert isinstance(descent, gf.GradientDescent)
    assert descent.momentum is not None and float(descent.momentum) == 0.5
    sde = dynamics_of(load, '{ kind = "StochasticFlow", step_size = 0.1, substeps = 4 }')
    assert isinstance(sde, gf.StochasticFlow) and sde.substeps == 4
    slow = dynamics_of(
        load,
        '{ kind = "SlowFlow", step_size = 0.1, finite_step = false, momentum = 0.5, '
        'decay = "decoupled", rtol = 1e-6, atol = 1e-9, cell = 0.5 }',
    )
    assert isinstance(slow, gf.SlowFlow) and not slow.finite_step and slow.momentum is not None
    assert slow.decay == "decoupled" and slow.cell is not None
    settings = slow.step_size, slow.momentum, slow.rtol, slow.atol, slow.cell
    assert tuple(map(float, settings)) == (0.1, 0.5, 1e-6, 1e-9, 0.5)


def test_replicas_of_a_slow_flow_need_noise_along_the_manifold(load):
    table = '{ kind = "SlowFlow", step_size = 0.1 }'
    text = HEAD + RUN.replace('{ kind = "GradientFlow" }', table)
    text += 'replicas = 4\nregularizers = [{ kind = "NOISE", std = 0.5 }]\n'
    assert built(load, text.replace("NOISE", "GradientNoise"))
    with pytest.raises(SpecError) as caught:
        built(load, text.replace("NOISE", "LabelNoise"))
    assert str(caught.value).endswith(
        'spec.toml:12: run "flow", replicas: got 4; this SlowFlow is not random (no noise moves it '
        "along the manifold), so all of them would be the same; leave it out"
    )


NORMALS = (
    RUN.replace('{ kind = "GradientFlow" }', '{ kind = "StochasticFlow", step_size = 0.1 }')
    + 'replicas = 6\nregularizers = [{ kind = "LabelNoise", std = 0.5 }]\n'
)
"""A random run without its `normals`."""


def test_normals(load):
    (run,) = built(load, HEAD + NORMALS)
    assert run.normals is None
    table = '{ antithetic = true, precision = "single" }'
    (run,) = built(load, HEAD + NORMALS + f"normals = {table}\n")
    assert run.normals == gf.Normals(antithetic=True, precision="single")
    (run,) = built(load, HEAD + NORMALS + 'normals = { law = "three-point" }\n')
    assert run.normals == gf.Normals(law="three-point")


@pytest.mark.parametrize(
    ("table", "replicas", "message"),
    [
        ("{ antithetic = true }", 5, "replicas=5: .*antithetic=True.* give an even number of them"),
        ('{ law = "two-point", precision = "single" }', 6, "no effect on the two-point law"),
        ('{ law = "two-point" }', 6, "order=2 needs them up to the fifth"),
    ],
)
def test_normals_that_do_not_serve_are_an_error_of_the_spec(load, table, replicas, message):
    text = NORMALS.replace("step_size = 0.1", "step_size = 0.1, order = 2")
    text = text.replace("replicas = 6", f"replicas = {replicas}") + f"normals = {table}\n"
    with pytest.raises(SpecError, match=rf'spec.toml:14: run "flow", normals: .*{message}'):
        built(load, HEAD + text)


def test_the_short_variant_keeps_whole_pairs(load):
    text = HEAD + NORMALS + "normals = { antithetic = true }\n[short]\nreplicas = 3\n"
    assert load(text, short=True).spec.run[0].replicas == 4


def test_regularizers(load):
    text = HEAD + RUN + (
        'regularizers = [{ kind = "LabelNoise", std = 0.5 }, { kind = "InputNoise", std = 0.2 }, '
        '{ kind = "WeightDecay", rate = 0.1 }, { kind = "Minibatch", batch_size = 2 }]\n'
    )  # fmt: skip
    kinds = [type(r) for r in built(load, text)[0].problem.regularizers]
    assert kinds == [gf.LabelNoise, gf.InputNoise, gf.WeightDecay, gf.Minibatch]


@pytest.mark.parametrize("kind", ["Dropout", "DropConnect"])
def test_a_regularizer_of_a_layer_that_is_not_there_is_an_error_of_the_spec(load, kind):
    wrong = f'regularizers = [{{ kind = "{kind}", rate = 0.1, layers = [7] }}]\n'
    with pytest.raises(SpecError, match=rf'run "flow", regularizers: {kind}.layers: .*7.*depth 2'):
        built(load, HEAD + RUN + wrong)


NETWORKS = {
    "gaussian": "widths = [1, 3, 1]\nscale = 0.5\nseed = 3",
    "orthogonal": "widths = [1, 3, 1]\nseed = 3",
    "balanced": "widths = [1, 3, 1]\ntarget = [[2.0]]",
    "unbalanced": "widths = [1, 3, 1]\nimbalance = 1.5\nseed = 3\nheavy = 2",
}


def test_networks(load):
    head = HEAD[: HEAD.index("[network]")]
    nets = {}
    for kind, keys in NETWORKS.items():
        text = f'{head}[network]\ninit = "{kind}"\n{keys}\n{RUN}'
        nets[kind] = built(load, text)[0].network
    key = jax.random.key(3)
    assert same(nets["gaussian"], gf.init.gaussian([1, 3, 1], 0.5, key))
    assert same(nets["orthogonal"], gf.init.orthogonal([1, 3, 1], key=key))
    assert same(nets["balanced"], gf.init.balanced([[2.0]], [1, 3, 1]))
    assert same(nets["unbalanced"], gf.init.unbalanced([1, 3, 1], 1.5, key, heavy=2))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def test_data(load, tmp_path):
    (tmp_path / "table.csv").write_text("a,b,y\n1,2,3\n2,1,5\n0,1,1\n4,0,2\n")
    tables = {
        "whitened": "target = [[2.0]]\nresidual = 0.5\nn = 4",
        "moments": "sxx = [[2.0]]\nsyx = [[1.0]]\nsyy = [[3.0]]",
        "file": 'path = "table.csv"\ntargets = ["y"]\ninputs = ["b"]\nstandardize = "inputs"',
        "sklearn": 'name = "linnerud"\ntargets = ["Waist"]',
    }
    data = {}
    for source, keys in tables.items():
        widths = [3, 2, 1] if source == "sklearn" else [1, 2, 1]
        text = (
            f'name = "test"\n[data]\nsource = "{source}"\n{keys}\n'
            f'[network]\ninit = "gaussian"\nwidths = {widths}\n{RUN}'
        )
        data[source] = built(load, text)[0].problem.data
    assert float(data["whitened"].syy[0, 0]) == 4.5 and float(data["whitened"].n) == 4
    assert float(data["moments"].irreducible_loss) == pytest.approx(0.5 * (3 - 0.5))
    b, y = np.array([2.0, 1, 1, 0]), np.array([3.0, 5, 1, 2])
    assert float(data["file"].syx[0, 0]) == pytest.approx(np.mean(y * (b - 1) / b.std()))
    assert data["sklearn"].target_names == ("Waist",)


def test_named_tables(load):
    text = (
        HEAD + '[networks.wide]\ninit = "gaussian"\nwidths = [1, 5, 1]\n'
        '[datasets.far]\nsource = "whitened"\ntarget = [[9.0]]\n'
        + RUN.replace("flow", "a")
        + RUN.replace("flow", "b")
        + 'network = "wide"\ndata = "far"\n'
        + RUN.replace("flow", "c")
        + 'network = { init = "gaussian", widths = [1, 4, 1] }\n'
    )
    runs = built(load, text)
    assert [run.network.widths for run in runs] == [(1, 1, 1), (1, 5, 1), (1, 4, 1)]
    assert [float(run.problem.data.syx[0, 0]) for run in runs] == [1.0, 9.0, 1.0]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("[[0.1]]", "[[0.1, 0.2]]", 5, "network: "),
        ('"whitened"\ntarget = [[1.0]]', '"moments"\nsxx = [[-1]]\nsyx = [[0]]', 2, "data: "),
        ("[[1.0]]", "[[1.0, 2.0]]", 5, "network: widths (1, 1, 1) do not fit the data with "
         "2 inputs and 1 targets"),
        ('"whitened"\ntarget = [[1.0]]', '"file"\npath = "no.csv"\ntargets = ["y"]', 2,
         "data: data.path: there is no file"),
    ],
)  # fmt: skip
def test_errors_name_the_line_of_the_table(load, tmp_path, old, new, line, message):
    with pytest.raises(SpecError) as caught:
        built(load, (HEAD + RUN).replace(old, new))
    assert str(caught.value).startswith(f"{tmp_path}/spec.toml:{line}: {message}")


def test_two_minibatches_are_an_error_of_the_regularizers(load):
    text = HEAD + RUN + (
        'regularizers = [{ kind = "Minibatch", batch_size = 2 }, '
        '{ kind = "Minibatch", batch_size = 3 }]\n'
    )  # fmt: skip
    with pytest.raises(SpecError, match=r'spec.toml:12: run "flow", regularizers: .*2 x Minibatch'):
        built(load, text)


def test_keys_depend_on_name_and_seed_only(load):
    def words(spec, i):
        return tuple(jax.random.key_data(run_key(spec, spec.run[i])).tolist())

    two = HEAD + RUN + RUN.replace("flow", "other")
    spec, swapped = load(two).spec, load(HEAD + RUN.replace("flow", "other") + RUN).spec
    assert words(spec, 0) == words(swapped, 1) != words(spec, 1)
    assert words(load(two, seed=1).spec, 0) != words(spec, 0)
    shared = load(HEAD + RUN + "seed = 5\n" + RUN.replace("flow", "other") + "seed = 5\n").spec
    assert words(shared, 0) == words(shared, 1)


def test_observables_that_a_dynamics_does_not_have(load):
    text = HEAD + RUN.replace(
        '{ kind = "GradientFlow" }',
        '{ kind = "GradientDescent", step_size = 0.1, momentum = 0.5 }',
    )
    with pytest.raises(SpecError, match=r'spec.toml:12: run "flow", observables: .*momentum'):
        built(load, text + 'observables = ["imbalance_drift"]\n')


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('quantity = "final"\nobservable = "squared_norms"',
         "component: is missing; squared_norms has shape [2]; give the indices of one entry"),
        ('quantity = "final"\nobservable = "squared_norms"\ncomponent = [2]',
         "component: got [2]; squared_norms has shape [2]; give the indices of one entry"),
        ('quantity = "max_change"\nobservable = "loss"\ncomponent = [0]',
         "component: got [0]; loss is a number"),
        ('quantity = "component_ratio"\nobservable = "squared_norms"\ncomponent = [1]\nover = [2]',
         "over: got [2]; squared_norms has shape [2]; give the indices of one entry"),
        ('quantity = "rate"\nobservable = "squared_norms"',
         "observable: squared_norms has shape [2]; rate needs a number"),
    ],
)  # fmt: skip
def test_entries_of_observables_are_checked_before_anything_runs(load, keys, message):
    claim = f'[[claim]]\nsentence = "x"\nrun = "flow"\nat_most = 1.0\n{keys}\n'
    with pytest.raises(SpecError) as caught:
        built(load, HEAD + RUN + claim)
    assert str(caught.value).endswith(f"claim 1, {message}")


def test_entries_that_fit(load):
    claim = '[[claim]]\nsentence = "x"\nrun = "flow"\nat_most = 1.0\nobservable = "squared_norms"\n'
    for keys in (
        'quantity = "final"\ncomponent = [-1]',
        'quantity = "max_change"',
        'quantity = "component_ratio"\ncomponent = [-1]\nover = [0]',
    ):
        (run,) = built(load, HEAD + RUN + claim + keys + "\n")
        assert run.shapes["squared_norms"] == (2,) and run.shapes["loss"] == ()


def test_entries_drawn_in_figures(load):
    figure = '[[figure]]\nkind = "time_series"\nobservables = ["loss", "squared_norms"]\n'
    assert built(load, HEAD + RUN + figure + "component = [1]\n")
    with pytest.raises(SpecError, match=r"spec.toml:12: figure 1, component: is missing; squared"):
        built(load, HEAD + RUN + figure)

"""Observe and steer: what a record holds, how edits compose, and that a model is left as it was."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from heed_core import Attend, observe, steer
from heed_core import masks as build
from heed_core.records import Running, WeightStatistics
from heed_core.sites import AttendCall, Probe, attach_points, sites, use_impl
from heed_core.testing.oracle import naive_attention


class Layer(nn.Module):
    def __init__(self, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)
        self.attend = Attend(causal=causal, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4)
        return x + self.attend(q, k, v, mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers with sites `layers.0.attend` and `layers.1.attend` (causal), and a probe."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(dropout=dropout), Layer(causal=True, dropout=dropout)])
        self.mixing = Probe()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        self.mixing(lambda: torch.ones(1, 1, 2, 2) / 2)
        return x


SITES = ["layers.0.attend", "layers.1.attend"]


@pytest.fixture
def model() -> Model:
    return Model().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64)


def attached(model: nn.Module) -> list[str]:
    return [n for n, point in attach_points(model).items() if point.attachments is not None]


def weights_of(model: Model, x: Tensor, **options: object) -> dict[str, Tensor]:
    with observe(model, "layers.*", **options) as record:
        model(x)
    return dict(record)


def test_sites_are_found_by_name(model) -> None:
    assert list(sites(model)) == SITES
    assert list(sites(model, "layers.1.*")) == SITES[1:]
    assert list(sites(model, ["*.1.*", "layers.0.attend"])) == SITES
    assert list(attach_points(model)) == [*SITES, "mixing"]
    assert list(sites(model.layers[0])) == ["attend"]
    assert list(sites(Attend())) == [""]


def test_a_pattern_without_a_match_names_the_nearest(model) -> None:
    with pytest.raises(
        ValueError, match=r"no attention site matches \['layer.0.attend'\].*layers.0.attend"
    ):
        sites(model, "layer.0.attend")
    with (
        pytest.raises(ValueError, match="no attention sites"),
        observe(nn.Linear(2, 2)),
    ):
        pass


def test_a_record_holds_the_weights(model, x) -> None:
    plain = model(x)
    with observe(model) as record:
        assert len(record) == 0
        watched = model(x)
    assert torch.equal(watched, plain), "observing changes bits of the output"
    assert list(record) == [*SITES, "mixing"]
    first = model.layers[0].project(x).unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4)
    q, k, _ = first
    identity = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    torch.testing.assert_close(record[SITES[0]], naive_attention(q, k, identity))
    assert not record[SITES[0]].requires_grad
    assert bool((record[SITES[1]].triu(1) == 0).all())
    torch.testing.assert_close(record[SITES[1]].sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert torch.equal(record["mixing"], torch.full((1, 1, 2, 2), 0.5))


def test_reductions_are_those_of_the_whole_map(model, x, monkeypatch) -> None:
    whole = weights_of(model, x)
    monkeypatch.setattr("heed_core.sites.PIECE_BYTES", 1)  # one query row at a time
    for site in SITES:
        w = whole[site]
        close = torch.testing.assert_close
        close(weights_of(model, x, reduce="heads")[site], w.mean(1))
        close(weights_of(model, x, reduce="queries")[site], w.mean(2))
        close(weights_of(model, x, queries=[-1, 0, 2])[site], w[:, :, [4, 0, 2]])
        close(weights_of(model, x, heads=[2, 0])[site], w[:, [2, 0]])
        close(weights_of(model, x, heads=[1], queries=[3], reduce="heads")[site], w[:, 1, 3:4])
        close(weights_of(model, x, queries=[1, 2], reduce="queries")[site], w[:, :, 1:3].mean(2))
        top = weights_of(model, x, reduce=lambda weights, call: weights.argmax(-1) + call.index)
        assert torch.equal(top[site], w.argmax(-1))


def test_reductions_under_edits_are_those_of_the_edited_map(model, x) -> None:
    def sharpen(weights: Tensor, call: AttendCall) -> Tensor:
        return weights.square() / weights.square().sum(-1, keepdim=True)

    with steer(model, sharpen):
        whole = weights_of(model, x)
        for options, expected in (
            ({"reduce": "heads"}, lambda w: w.mean(1)),
            ({"reduce": "queries"}, lambda w: w.mean(2)),
            ({"queries": [-1], "heads": [2]}, lambda w: w[:, 2:, 4:]),
        ):
            found = weights_of(model, x, **options)
            for site in SITES:
                torch.testing.assert_close(found[site], expected(whole[site]))


def test_pieces_follow_masks_and_biases_of_every_rank(monkeypatch) -> None:
    monkeypatch.setattr("heed_core.sites.PIECE_BYTES", 1)
    site = Attend()
    q, k, v = (torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3), torch.randn(2, 2, 7, 3))
    for mask in (
        torch.rand(5, 7),
        torch.rand(4, 5, 7),
        torch.rand(2, 4, 5, 7),
        torch.rand(2, 1, 1, 7),
        torch.rand(7),
        torch.rand(5, 1),
    ):
        allowed, bias = mask > 0.4, torch.randn(mask.shape)
        identity = torch.eye(7).expand(2, 2, 7, 7)
        for causal in (False, True):
            full = naive_attention(q, k, identity, mask=allowed, bias=bias, causal=causal)
            with observe(site, heads=[3, 1], queries=[4, 1, 2]) as record:
                site(q, k, v, mask=allowed, bias=bias, causal=causal)
            torch.testing.assert_close(record[""], full[:, [3, 1]][:, :, [4, 1, 2]])


def test_statistics_run_over_calls_in_constant_memory(model) -> None:
    inputs = [torch.randn(2, n, 6, dtype=torch.float64) * n for n in (5, 3, 8)]
    with observe(model, "layers.0.*", reduce="stats") as record:
        for x in inputs:
            model(x)
    with observe(model, "layers.0.*", keep="all") as maps:
        for x in inputs:
            model(x)
    calls = maps.calls(SITES[0])
    rows = [
        [row for w in calls for row in w[:, head].reshape(-1, w.shape[-1])] for head in range(3)
    ]
    statistics = record.statistics(SITES[0])
    measures = {
        "entropy": lambda row: -(row * row.log()).sum(),
        "max": lambda row: row.max(),
        "mean": lambda row: row.mean(),
    }
    for column, (name, measure) in enumerate(measures.items()):
        values = torch.tensor([[measure(row) for row in head] for head in rows]).double()
        found: Running = getattr(statistics, name)
        torch.testing.assert_close(found.mean, values.mean(1))
        torch.testing.assert_close(found.std, values.std(1, correction=0))
        torch.testing.assert_close(record[SITES[0]][:, column], values.mean(1))
        assert found.count.tolist() == [2 * (5 + 3 + 8)] * 3
    with pytest.raises(ValueError, match="observe with reduce='stats'"):
        maps.statistics(SITES[0])


def test_statistics_leave_empty_rows_out() -> None:
    weights = torch.tensor([[[[0.5, 0.5], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    statistics = WeightStatistics.empty(2, torch.device("cpu"))
    statistics.update(weights)
    assert statistics.max.count.tolist() == [1, 2]
    assert statistics.max.mean.tolist() == [0.5, 1.0]
    assert float(statistics.entropy.mean[0]) == pytest.approx(0.6931471805599453)


def test_keep_all_keeps_every_call_in_order(model) -> None:
    first, second = torch.randn(1, 4, 6).double(), torch.randn(1, 3, 6).double()
    with observe(model, keep="all") as record:
        model(first)
        model(second)
    assert [w.shape[-1] for w in record.calls(SITES[0])] == [4, 3]
    assert record[SITES[0]].shape[-1] == 3
    with observe(model) as record:
        model(first)
        model(second)
    assert [w.shape[-1] for w in record.calls(SITES[0])] == [3]


def test_a_record_explains_what_it_lacks(model, x) -> None:
    with observe(model, "layers.*") as record:
        model.layers[0](x)
    assert list(record) == SITES[:1]
    with pytest.raises(KeyError, match="was not called"):
        record[SITES[1]]
    with pytest.raises(KeyError, match="is not observed"):
        record["encoder"]
    assert SITES[1] not in record


def test_the_graph_is_kept_on_request(model, x) -> None:
    with observe(model, "layers.*", grad=True) as record:
        y = model(x)
    gradient = torch.autograd.grad(y.square().sum(), record[SITES[0]], retain_graph=True)[0]
    # finite difference along one direction, through an edit that adds to the weights
    direction = torch.randn_like(gradient)
    values = []
    for step in (1e-5, -1e-5):
        with steer(model, lambda w, call, step=step: w + step * direction, SITES[0]):
            values.append(model(x).square().sum())
    slope = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)
    with observe(model, "layers.*", grad=True, reduce="heads") as record:
        model(x)
    assert record[SITES[0]].requires_grad


def test_selections_out_of_range_are_named(model, x) -> None:
    with (
        pytest.raises(ValueError, match=r"heads=\[3\] are out of range"),
        observe(model, heads=[3]),
    ):
        model(x)
    with pytest.raises(ValueError, match=r"queries=\[-6\]"), observe(model, queries=[-6]):
        model(x)
    assert attached(model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"reduce": "median"}, "reduce must be", marks=pytest.mark.bad_input),
        pytest.param({"keep": "first"}, "keep must be", marks=pytest.mark.bad_input),
        pytest.param({"stage": "late"}, "stage must be", marks=pytest.mark.bad_input),
        ({"reduce": "stats", "grad": True}, "takes no grad"),
    ],
)
def test_bad_options_are_named(model, options, message) -> None:
    with pytest.raises(ValueError, match=message), observe(model, **options):
        pass


def test_steering_nothing_gives_the_same_within_rounding(model, x) -> None:
    for at in ("scores", "weights", "output"):
        with steer(model, lambda tensor, call: tensor, at=at):
            torch.testing.assert_close(model(x), model(x))
            assert len(attached(model)) == 2
        assert attached(model) == []


def test_edits_compose_in_the_order_of_entering(model, x) -> None:
    def double(weights: Tensor, call: AttendCall) -> Tensor:
        return weights * 2

    def add(weights: Tensor, call: AttendCall) -> Tensor:
        return weights + 1

    first = weights_of(model, x)[SITES[0]]
    with steer(model, double, SITES[0]), steer(model, add, SITES[0]):
        torch.testing.assert_close(weights_of(model, x)[SITES[0]], first * 2 + 1)
    with steer(model, add, SITES[0]), steer(model, double, SITES[0]):
        torch.testing.assert_close(weights_of(model, x)[SITES[0]], (first + 1) * 2)


def test_raw_and_final_weights(model, x) -> None:
    raw = weights_of(model, x)[SITES[0]]

    def halve(scores: Tensor, call: AttendCall) -> Tensor:
        return scores * 0.5

    def square(weights: Tensor, call: AttendCall) -> Tensor:
        return weights.square()

    with (
        observe(model, SITES[0], stage="raw") as before,
        observe(model, SITES[0]) as after,
        steer(model, halve, SITES[0], at="scores"),
        steer(model, square, SITES[0]),
    ):
        model(x)
    torch.testing.assert_close(before[SITES[0]], raw)
    halved = (raw.log() * 0.5).softmax(-1)
    torch.testing.assert_close(after[SITES[0]], halved.square())


def test_an_edit_of_outputs(model, x) -> None:
    site = model.layers[0].attend
    q, k, v = torch.randn(3, 2, 3, 5, 2).double()
    plain = site(q, k, v)
    with steer(site, lambda out, call: out * 2, at="output"):
        assert torch.equal(site(q, k, v), plain * 2)


def test_the_call_tells_the_edit_where_it_is(model, x) -> None:
    seen: list[AttendCall] = []

    def note(scores: Tensor, call: AttendCall) -> Tensor:
        seen.append(call)
        return scores

    mask = build.padding(torch.tensor([4, 5]), 5)
    with observe(model):
        model(x)
        with steer(model, note, at="scores"):
            model(x, mask)
            model(x, mask)
    assert [(call.site, call.index) for call in seen] == [(s, i) for i in (0, 1) for s in SITES]
    first, second = seen[:2]
    assert first.scale == pytest.approx(2**-0.5)
    assert (first.causal, second.causal, first.q_offset) == (False, True, 0)
    assert torch.equal(first.allowed, mask)
    assert torch.equal(second.allowed, mask & build.causal(5))
    assert first.query.shape == first.key.shape == first.value.shape == (2, 3, 5, 2)


def test_what_may_not_attend_stays_out_whatever_the_edit(x) -> None:
    site = Attend(causal=True)
    q, k, v = torch.randn(3, 2, 1, 4, 3)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 2] = False
    for at, edit in (
        ("scores", lambda s, call: torch.ones_like(s) * 50),
        ("weights", lambda w, call: torch.ones_like(w) / 4),
    ):
        with steer(site, edit, at=at), observe(site) as record:
            out = site(q, k, v, mask=mask)
        assert bool((record[""].masked_select(~(mask & build.causal(4))) == 0).all())
        assert bool((out[:, :, 2] == 0).all())
        assert bool(record[""][:, :, 3].ne(0).all())


def test_gradients_of_a_score_edit_are_finite_under_a_mask() -> None:
    site, factor = Attend(causal=True), torch.ones(2, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 4, 3)
    with steer(site, lambda s, call: s * factor[:, None, None], at="scores"):
        site(q, k, v).square().sum().backward()
    assert bool(factor.grad.isfinite().all())
    assert bool(factor.grad.ne(0).all())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda w, call: w[..., :-1], ValueError, "must keep the shape"),
        (lambda w, call: None, TypeError, "must return a tensor"),
        (lambda w, call: w.mul_(2), ValueError, "in place"),
    ],
)
def test_a_bad_edit_is_named(model, x, edit, error, message) -> None:
    with (
        torch.no_grad(),
        pytest.raises(error, match=rf"the edit of weights at site 'layers.0.attend'.*{message}"),
        steer(model, edit),
    ):
        model(x)
    assert attached(model) == []


@pytest.mark.bad_input
def test_bad_arguments_of_steer(model) -> None:
    with (
        pytest.raises(ValueError, match="at must be one of"),
        steer(model, lambda w, c: w, at="keys"),
    ):
        pass
    with pytest.raises(TypeError, match="edit must be a function"), steer(model, 3):
        pass


def test_a_probe_is_not_steered(model) -> None:
    with (
        pytest.raises(ValueError, match="but not steered"),
        steer(model, lambda w, c: w, "mixing"),
    ):
        pass


def test_an_exception_restores_the_model(model, x) -> None:
    plain = model(x)

    def fail(weights: Tensor, call: AttendCall) -> Tensor:
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"), observe(model), steer(model, fail):
        model(x)
    assert attached(model) == []
    assert torch.equal(model(x), plain)


def test_two_models_do_not_meet(model, x) -> None:
    other = copy.deepcopy(model)
    plain = other(x)
    with observe(model) as record, steer(model, lambda w, call: w * 0):
        assert torch.equal(other(x), plain)
        assert len(record) == 0


def test_dropout_of_the_explicit_path_acts_in_training_only(x) -> None:
    model = Model(dropout=0.5).double()
    with steer(model, lambda w, call: w), observe(model, "layers.*") as record:
        a, b = model(x), model(x)
        assert not torch.equal(a, b)
        torch.testing.assert_close(record[SITES[0]].sum(-1), torch.ones(2, 3, 5).double())
        model.eval()
        assert torch.equal(model(x), model(x))


def test_training_is_the_same_while_observed(x) -> None:
    model = Model(dropout=0.5).double()
    gradients = []
    for watch in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        if watch:
            with observe(model, reduce="stats"):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
        gradients.append(model.layers[0].project.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_reduced_record_holds_no_map() -> None:
    """Peak of what is recorded at n = 2048 stays far below one map (16 MiB per head)."""
    site = Attend()
    q, k, v = torch.randn(3, 1, 1, 2048, 4)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    sizes.append(x.numel())
            return out

    import heed_core.sites as module

    before, module.PIECE_BYTES = module.PIECE_BYTES, 2**18
    try:
        with observe(site, reduce="queries") as record, Sizes():
            site(q, k, v)
    finally:
        module.PIECE_BYTES = before
    assert record[""].shape == (1, 1, 2048)
    assert max(sizes) <= 2**18 / 4


def test_the_explicit_path_is_logged_once_per_context(model, x, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="heed_core.sites"), observe(model):
        model(x)
        model(x)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "observing 3 sites" in caplog.text


def test_use_impl_sets_every_site(model) -> None:
    use_impl(model, "reference")
    assert {site.impl for site in sites(model).values()} == {"reference"}


@pytest.mark.bad_input
def test_use_impl_names_a_bad_choice(model) -> None:
    with pytest.raises(ValueError, match="impl must be one of"):
        use_impl(model, "fast")


def test_attend_shows_its_settings_and_checks_dropout() -> None:
    assert repr(Attend(causal=True, dropout=0.1)) == "Attend(causal=True, dropout=0.1)"
    assert repr(Attend()) == "Attend()"
    with pytest.raises(ValueError, match="dropout must be in"):
        Attend(dropout=1.0)
    assert list(Attend().state_dict()) == []


class Foreign(nn.Module):
    """A model that we did not write, with one site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attend()

    def attention_sites(self) -> dict[str, Attend]:
        return {"block.attention": self.inner}

    def forward(self, q: Tensor) -> Tensor:
        return self.inner(q, q, q)


def test_foreign_sites_are_found_under_their_names() -> None:
    model = nn.ModuleDict({"a": Foreign(), "b": Attend()})
    assert list(attach_points(model)) == ["a.block.attention", "b"]
    q = torch.randn(1, 1, 3, 2)
    with observe(model, "a.*") as record:
        model["a"](q)
    assert record["a.block.attention"].shape == (1, 1, 3, 3)


# torch's own tracer reads `.grad` of every tensor where a graph breaks, and hides this warning
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.compile
def test_a_compiled_model_can_be_observed_and_steered(model, x) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(x)
    with observe(compiled, "layers.*") as record, steer(compiled, lambda w, call: w * 0):
        torch.testing.assert_close(compiled(x), x)
    assert list(record) == SITES
    torch.testing.assert_close(compiled(x), plain)

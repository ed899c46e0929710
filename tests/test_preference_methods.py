"""Learning from pairs, in float64: every method against section 4 of the design notes written out."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny.gradients import flat, relative, with_adapters
from tiny.stable_diffusion import tiny_stable_diffusion
from tiny_pipelines import named

from nemo_aligner_diffusion.algorithms.preference.corrections import Corrections
from nemo_aligner_diffusion.algorithms.preference.dde import stepwise
from nemo_aligner_diffusion.algorithms.preference.loss import pair_loss, preferred_share, pull
from nemo_aligner_diffusion.algorithms.preference.module import BINS, PreferenceTuning
from nemo_aligner_diffusion.algorithms.preference.watch import both_rise
from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.data.preferences.settings import PairSettings, SelfMadeSettings
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError
from nemo_aligner_diffusion.rewards.rules import Symmetry

METHODS = [name for name, method in methods().items() if method.kind == "preference"]
SEED = 3
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]])


def pairs(seed=0):
    pictures = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"pictures": pictures, "prompts": ["a", "fish", "two"], "labels": LABELS, "index": torch.tensor([4, 9, 2])}


def tuning(name, model=None, adapters=True, settings=None, **own):
    model = model or tiny_stable_diffusion(torch.float64)
    if adapters:
        with_adapters(model, ("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    module = PreferenceTuning(
        methods()[name](**own),
        PairSettings(**{"vae_sample": False, "label_smoothing": 0.1, **(settings or {})}),
        model=model, reward=None, sampling=Sampling(height=16, width=16), optimizer_factory=None, seed=SEED,
    )  # fmt: skip
    model.eval()
    return module


class Written:
    """Section 4, with nothing of the package but the noise's key."""

    def __init__(self, model, batch):
        pipe = model.pipe
        self.unet, scheduler = pipe.unet, pipe.scheduler
        self.prediction_type = scheduler.config.prediction_type
        text, _ = pipe.encode_prompt(batch["prompts"], "cpu", 1, False)
        self.text = text
        self.signal = scheduler.alphas_cumprod.double()
        with torch.no_grad():
            rows = pipe.vae.encode(2 * batch["pictures"].double().flatten(0, 1) - 1).latent_dist.mode()
        self.z = (rows * pipe.vae.config.scaling_factor).unflatten(0, (-1, 2))
        keys = [sample_generator(SEED, 0, int(index)) for index in batch["index"]]
        drawn = [(int(torch.randint(0, 1000, (), generator=key)), torch.randn(4, 4, 4, generator=key)) for key in keys]
        self.t, self.noise = torch.tensor([t for t, _ in drawn]), torch.stack([noise for _, noise in drawn]).double()

    def d(self, place):
        z = self.z[range(3), place]
        signal = self.signal[self.t].reshape(-1, 1, 1, 1)
        noisy = signal.sqrt() * z + (1 - signal).sqrt() * self.noise
        out = self.unet(noisy, self.t, encoder_hidden_states=self.text).sample
        if self.prediction_type == "v_prediction":
            out = signal.sqrt() * out + (1 - signal).sqrt() * noisy
        return (self.noise - out).square().mean((1, 2, 3))

    def delta(self, model, place):
        with torch.no_grad(), model.reference():
            reference = self.d(place)
        return self.d(place) - reference

    def w(self, name):
        signal, t = self.signal[self.t], self.t.double()
        return {
            "dpo": torch.full_like(t, 0.5),
            "discounted": 0.5 * 0.9 ** ((999 - t) / 1000 * 50),
            "dde_single": (1 - signal) / signal,
            "dde": (1 - signal) / signal,
            "dde_step": torch.tensor([self.v(int(s)) for s in t], dtype=torch.float64),
        }[name]

    def v(self, s):
        before = self.signal[s - 1] if s else torch.ones(()).double()
        alpha = self.signal[s] / before
        beta = 1 - alpha
        variance = beta * (1 - before) / (1 - self.signal[s])
        return float(beta**2 / (2 * variance * alpha * (1 - self.signal[s])))


def table_of(seed=1):
    return torch.randn(1000, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_definition(name, prediction):
    batch = pairs()
    beta = {} if name == "sft" else {"beta": 300.0}
    module = tuning(name, tiny_stable_diffusion(torch.float64, prediction_type=prediction), **beta)
    if module.corrections is not None:
        module.corrections.load_state_dict({"table": table_of()})
    loss = module.training_step(batch, 0)
    written = Written(module.model, batch)
    winner = [0, 1, 0]
    if name == "sft":
        expected = written.d(winner).mean()
    else:
        delta = [written.delta(module.model, place) for place in (winner, [1 - place for place in winner])]
        above = torch.zeros(3, dtype=torch.float64)
        if name in ("dde", "dde_step"):
            for row, t in enumerate(written.t):
                for s in range(int(t) + 1, 1000):
                    above[row] += table_of()[s, 0] - table_of()[s, 1]
        argument = -300 * (written.w(name) * (delta[0] - delta[1]) + above)
        share = 0.9 * LABELS.double().amax(1) + 0.1 * LABELS.double().amin(1)
        sigma = torch.sigmoid(argument)
        expected = -(share * sigma.log() + (1 - share) * (1 - sigma).log()).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    got, wanted = flat(module.model, loss), flat(module.model, expected)
    assert wanted.norm() > 0
    assert relative(got, wanted) < 1e-9


def test_diffusion_dpos_published_form():
    """Its ``train.py``: ``−0.5·beta_dpo·(model_diff − ref_diff)`` of losses averaged over a latent's elements."""
    batch = pairs()
    module = tuning("dpo", settings={"label_smoothing": 0.0})
    module.training_step({**batch, "labels": torch.tensor([[1.0, 0.0]] * 3)}, 0)
    written = Written(module.model, batch)
    with torch.no_grad():
        model_diff = written.d([0, 0, 0]) - written.d([1, 1, 1])
        with module.model.reference():
            ref_diff = written.d([0, 0, 0]) - written.d([1, 1, 1])
        inside_term = -0.5 * 5000 * (model_diff - ref_diff)
        loss = -torch.nn.functional.logsigmoid(inside_term).mean()
    figures = module._micro_batches[0]
    assert float(figures["loss"]) == pytest.approx(float(loss), rel=1e-9)
    assert float(figures["implicit_accuracy"]) == pytest.approx(float((inside_term > 0).double().mean()))
    assert float(figures["implicit_margin"]) == pytest.approx(float(inside_term.mean()), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sft"])
def test_a_model_that_has_not_moved_has_log_2(name):
    from nemo_aligner_diffusion.diffusion.lora import add_lora

    module = tuning(name, adapters=False)
    add_lora(module.model.denoiser, 2, 2.0, 0.0, ["to_q", "to_v"])
    assert float(module.training_step(pairs(), 0).detach()) == math.log(2)
    figures = {name: float(value) for name, value in module._micro_batches[0].items()}
    assert (figures["implicit_accuracy"], figures["implicit_margin"], figures["winner_error"]) == (0.5, 0.0, 0.0)


def test_swapping_the_pictures_changes_nothing_and_swapping_the_labels_turns_the_argument():
    batch = pairs()
    margins = []
    swapped = {**batch, "pictures": batch["pictures"].flip(1)}
    for given in (batch, {**swapped, "labels": LABELS.flip(1)}, {**batch, "labels": LABELS.flip(1)}):
        module = tuning("dde_single")
        module.training_step(given, 0)
        margins.append(float(module._micro_batches[0]["implicit_margin"]))
    assert margins[0] != 0
    assert margins[1] == pytest.approx(margins[0], rel=1e-9)
    assert margins[2] == pytest.approx(-margins[0], rel=1e-9)


def test_a_pairs_pictures_share_level_and_noise_and_the_range_is_kept():
    module = tuning("dpo", settings={"steps": [200, 210]})
    t, noise = module.draw([sample_generator(SEED, 0, index) for index in range(64)])
    assert set(t.tolist()) == set(range(200, 210))
    again, same = module.draw([sample_generator(SEED, 0, index) for index in (7, 3)])
    assert again.tolist() == [int(t[7]), int(t[3])]
    assert torch.equal(same, noise[[7, 3]])
    clean = torch.zeros(2, 64, *module.calls.latent_shape, dtype=torch.float64)
    errors = module.errors(module.calls.conditioning(["a"] * 64), clean, noise, t)
    assert torch.allclose(errors[0], errors[1], rtol=1e-12)


def test_a_tie_counts_as_much_as_it_is_said_to():
    losses = {}
    tied = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    for weight in (0.0, 0.25, 1.0):
        module = tuning("dpo", settings={"tie_weight": weight})
        losses[weight] = float(module.training_step({**pairs(), "labels": tied}, 0).detach())
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-9)
    assert losses[1.0] > losses[0.0]


def test_online_pairs_are_the_present_models_own_and_labelled_by_the_reward():
    def made(**own):
        module = tuning("dpo", settings={"pairs": "online", **own})
        assert module.reward_is == "reward"
        module.reward, module.sampling = Symmetry().build(), Sampling(steps=2, height=16, width=16)
        return module, *module.latents({"prompts": ["a", "b"]}, [4, 9], [])

    module, latents, labels = made()
    assert latents.shape == (2, 2, *module.calls.latent_shape)
    vae = module.model.pipe.vae
    with torch.no_grad():
        pictures = (vae.decode(latents.flatten(0, 1) / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    scores = Symmetry().score(pictures, ["a", "a", "b", "b"]).reshape(2, 2)
    assert torch.equal(labels.argmax(1), scores.argmax(1))
    assert labels.sum(1).tolist() == [1, 1]
    assert torch.equal(made(self_made=SelfMadeSettings(label_noise=1.0))[2], labels.flip(1))
    loss = module.training_step({"prompts": ["a", "b"], "index": torch.tensor([4, 9])}, 0)
    assert flat(module.model, loss).norm() > 0


# The weights over noise levels


class VP:
    """Stable Diffusion's levels."""

    size, flow = 1000, False

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0)
        self.alphas, self.sigmas = signal.sqrt(), (1 - signal).sqrt()


class Flow:
    size, flow = 1000, True
    sigmas = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alphas = 1 - sigmas


def test_the_scales_are_comparable():
    """As the keys' meanings say: β times the median weight, with the corrections above it, is about 2500."""
    levels = VP()
    for name in METHODS:
        method = methods()[name]()
        if method.compares:
            weights = torch.tensor(method.weights(levels))
            found = torch.tensor(method.corrections(levels) or [0.0] * 1000)
            above = found.flip(0).cumsum(0).flip(0) - found
            assert 2200 < method.scale * float((weights + above).median()) < 2700, name


def test_the_ends_of_the_correction():
    found = stepwise(VP())
    assert found[0] == pytest.approx(1.0, rel=0.01)  # the variance of s = 1 in the place of 0
    assert all(math.isfinite(value) and value > 0 for value in found)
    assert sum(found[1:]) == pytest.approx(6.53, rel=0.01)


def test_the_gradient_is_largest_in_the_middle():
    """The paper's claim, of a model that prefers the winner by the same Δ at every level."""
    method, levels = methods()["dde"](), VP()
    weights = torch.tensor(method.weights(levels))
    gap = torch.full((1000,), -2e-3)
    corrections = Corrections(method.corrections(levels), 1.0)
    corrections.learn((t, float(gap[t]) / 2, -float(gap[t]) / 2) for t in range(1000))
    argument = -method.scale * (weights * gap + corrections.above(torch.arange(1000)))
    effect = pull(argument, torch.ones(1000)) * method.scale * weights
    peak = int(effect.argmax())
    assert 200 < peak < 800
    assert float(effect[0]) < 0.1 * float(effect[peak])
    assert float(effect[-1]) < 0.1 * float(effect[peak])


def test_what_a_method_cannot_be_on_is_one_message():
    for name in ("dde", "dde_step"):
        with pytest.raises(ConfigurationError, match=f"{name}: .*this one is a flow; expected dpo, discounted, sft"):
            methods()[name]().weights(Flow())
    assert methods()["dde_single"]().weights(Flow()) == pytest.approx((Flow.sigmas**2).tolist())
    levels = VP()
    levels.alphas[-1] = 0.0
    with pytest.raises(
        ConfigurationError, match=r"dde: its weight at t = 999 is infinite, .*steps=\[0,999\], or model.dde"
    ):
        methods()["dde"]().check_weights(levels, 0, 1000)
    methods()["dde"]().check_weights(levels, 0, 999)
    methods()["dde"](max_weight=100.0).check_weights(levels, 0, 1000)
    methods()["dpo"]().check_weights(levels, 0, 1000)
    with pytest.raises(ConfigurationError, match=r"beta = 0: expected a number > 0"):
        methods()["dpo"](beta=0)
    with pytest.raises(ConfigurationError, match=r"\[900, 1200\]: this model has 1000 noise levels"):
        tuning("dpo", settings={"steps": [900, 1200]}).range  # noqa: B018


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families(family, caplog):
    row = named(family)
    model = DiffusionModel(
        row.build(), row.train, row.stateless, {k: v for k, v in row.arguments.items() if k not in ("height", "width")}
    )
    with_adapters(model, row.lora_targets)
    size = torch.tensor(model.pipe(["a"], num_inference_steps=1, output_type="pt", **row.arguments)[0]).shape[-1]
    batch = {**pairs(), "pictures": torch.rand(3, 2, 3, size, size)}
    module = PreferenceTuning(
        methods()["dpo" if family == "sdxl" else "dde_single"](), PairSettings(), model=model, reward=None,
        sampling=Sampling(steps=2, height=size, width=size), optimizer_factory=None,
    )  # fmt: skip
    module.check_pipeline()
    assert ("an experiment" in caplog.text) == (family != "sdxl")
    module.trained = model.trainable_parameters()  # as with the optimizer
    before = module.trained[0][1]
    before.grad = torch.ones_like(before)
    loss = module.training_step(batch, 0)
    assert before.grad is None  # of the step before: not held while the next one computes
    assert torch.isfinite(loss)
    assert flat(model, loss).norm() > 0
    if family != "sdxl":
        refused = PreferenceTuning(
            methods()["dde"](), PairSettings(), model=model, reward=None,
            sampling=Sampling(steps=2, height=size, width=size), optimizer_factory=None,
        )  # fmt: skip
        with pytest.raises(ConfigurationError, match="this one is a flow"):
            refused.check_pipeline()


# The table


def test_the_table_is_a_brute_force_recomputation():
    weights, rate, rng = [rng_value / 10 for rng_value in range(50)], 0.3, random.Random(0)
    table = Corrections(weights, rate)
    history = []
    for _ in range(20):
        rows = [(rng.randrange(50), rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(8)]
        history += rows
        table.learn(rows)
    for t in range(50):
        winner = loser = 0.0
        for level, first, second in history:
            if level == t:
                winner, loser = (
                    (1 - rate) * of + rate * weights[t] * new for of, new in ((winner, first), (loser, second))
                )
        assert table.table[t].tolist() == pytest.approx([winner, loser], rel=1e-12)
    gap = table.table[:, 0] - table.table[:, 1]
    expected = [float(gap[t + 1 :].sum()) for t in range(50)]
    assert table.above(torch.arange(50)).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    again = Corrections(weights, rate)
    again.load_state_dict(table.state_dict())
    assert torch.equal(again.above(torch.arange(50)), table.above(torch.arange(50)))
    with pytest.raises(CheckpointError, match="not \\(40, 2\\)"):
        Corrections(weights[:40], rate).load_state_dict(table.state_dict())


def test_the_disease_is_told_from_noise():
    rng = random.Random(1)
    flat_, rising = ([slope * step + rng.gauss(0, 1e-3) for step in range(40)] for slope in (0.0, 2e-4))
    assert both_rise(rising, rising)
    assert not both_rise(flat_, flat_)
    assert not both_rise(flat_, rising)
    assert not both_rise([value - 1 for value in rising], rising), "better than the base model, still"
    assert not both_rise(rising[:30], rising[:30])


def test_soft_labels():
    argument = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    share = preferred_share(torch.tensor([[0.2, 0.8], [1.0, 0.0]]), 0.1).double()
    assert share.tolist() == pytest.approx([0.74, 0.9])
    loss = pair_loss(argument, share)
    (gradient,) = torch.autograd.grad(loss.sum(), argument)
    assert torch.allclose(-gradient, pull(argument, share).detach())
    assert BINS == 20

"""Local steps under DP-SGD: the only room that touches Opacus.

What makes the guarantee, in the order of docs/privacy.md:

1. Each patient enters a step independently with the public probability q = batch / declared size,
   from the keystream handed in; a batch is never truncated, redrawn or padded. A physical batch
   may be smaller than the logical one: it bounds memory, not the mechanism.
2. One random image of each sampled patient (or images of one random study), in `multiplicity`
   augmented copies of as many rows as the task makes of it, gives one loss a patient: the mean
   over the copies of the sum over their rows. A patient's rows never cross a physical batch.
   Losses are summed, a patient's gradient is clipped to L2 norm C in float32, and one that is not
   finite, or too long for its norm to be taken, becomes zero.
   Synthetic images that the run mixes in are clipped alike and added after the patients.
3. Gaussian noise of deviation sigma x C from the keystream, then division by the public batch
   size, of patients and synthetic images. An empty batch releases noise like any other.
   In a sparse run, what is zero in the round's global weights is not learned: its gradient is
   made zero before the clipping, and its noise after, by those public weights alone.
4. Weight decay, momentum and FedProx's proximal term act on the noised sum: post-processing. So
   is what a task does after a step (`Task.follow`), of which no patient is a part; its randomness
   is its own, or how much of it was used would tell of the batch.

What `train` returns beside the update (losses, counts) is for the node's own log.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.memory import OF_KERNELS, peak_bytes
from client.synthetic import check_enough
from common import models
from common.accounting import SubsampledGaussian, sampling_rate
from common.cohort import Cohort
from common.errors import ModelError, Refusal, RefusalCode
from common.messages import LARGEST_WEIGHT
from common.noise import Keystream
from common.spec import DpSgd, FedProx, RunSpec, Sgd
from common.studies import rows_for
from common.tasks import task_for
from common.tasks.augment import augment
from common.tasks.preprocess import normalise

log = logging.getLogger("cloister.training")

Arrays = Mapping[str, NDArray[np.float32]]

_NORM_BLOCK = 2**15
# Float32 tensors of an image's size that come and go around the network: the image as it is read,
# repeated, changed and moved to the device, with a mask of eight bytes a pixel as often; and what
# a loss makes of the outputs.
_IMAGE_COPIES, _LOSS_COPIES = 8, 12
# Between these float32 keeps all its digits, with room for sums and for factors like C / norm.
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-12, 1e30
_LARGEST_NORM = 1e18  # beyond it the squares overflow, or C / norm comes near the denormals


@dataclass(frozen=True)
class Compute:
    """Where to train, and how many images at once (None: by the network's size).

    The size of a physical batch bounds memory; it does not change what is computed. Where it is
    not given, what its patients take (`patient_bytes`) fits into `gradient_memory` bytes.
    """

    device: torch.device
    physical_images: int | None = None
    gradient_memory: int = 512 * 2**20


@dataclass(frozen=True)
class LocalResult:
    """What a round of local steps gave.

    Attributes:
        update: trained minus global weights, float32, by parameter name. Under DP-SGD this is
            the noised release; everything else here stays in the node.
        drawn: the mechanism as it was really executed, or None without privacy.
        mean_loss: over the sampled patients, NaN if there was none.
        sampled: patients in each step.
        zeroed: patients whose gradient was not finite, or beyond 1e18, and became zero.
    """

    update: dict[str, NDArray[np.float32]]
    drawn: SubsampledGaussian | None
    mean_loss: float
    sampled: tuple[int, ...]
    zeroed: int


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with the patient as unit and the keystream as source of noise.

    Args:
        optimizer: what applies the noised mean gradient.
        noise_multiplier: sigma.
        clip_norm: C, the L2 bound of one patient's gradient.
        normaliser: the public expected batch size.
        keystream: where the noise comes from.

    Raises:
        ValueError: if C or sigma x C is not a number that float32 carries with room to spare.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        normaliser: int,
        keystream: Keystream,
    ) -> None:
        _check_scale(noise_multiplier, clip_norm)
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=normaliser,
        )
        self.keystream = keystream
        self.zeroed = 0
        self.learned: list[Tensor] | None = None  # of each parameter which numbers; None: all

    def begin(self) -> None:
        """Start a logical batch with a sum of zero, so that an empty one is a batch too."""
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.summed_grad = torch.zeros_like(parameter)

    def accumulate(self, patients: int) -> None:
        """Clip the per-patient gradients of one physical batch and add them to the sum.

        The per-row gradients lie patient by patient, and already carry the factor of the mean
        over a patient's copies. How many rows a patient has is each layer's own: one that sees
        the images of a study has more than one that sees what they were pooled to.

        Raises:
            ModelError: if a layer has not as many rows of each patient.
        """
        gradients = [self._by_patient(parameter, patients) for parameter in self.params]
        for gradient, learned in zip(gradients, self.learned or (), strict=bool(self.learned)):
            gradient.mul_(learned)  # before it is clipped: what is not learned takes no part of C
        norms = _norms(gradients)
        finite = norms <= _LARGEST_NORM  # false of NaN
        if not finite.all():
            self.zeroed += int((~finite).sum())
            for gradient in gradients:
                gradient[~finite] = 0  # in place: there may be no room for a copy
        factor = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
        for parameter, gradient in zip(self.params, gradients, strict=True):
            clipped = factor @ gradient.flatten(1)
            parameter.summed_grad += clipped.view_as(parameter)
            parameter.grad_sample = None

    def add_noise(self) -> None:
        """Draw all noise of the step from the keystream at once; the result is in ``grad``."""
        deviation = self.noise_multiplier * self.max_grad_norm
        drawn = self.keystream.gaussian(sum(parameter.numel() for parameter in self.params))
        noise = torch.from_numpy((drawn * deviation).astype(np.float32))
        start = 0
        for parameter in self.params:
            part = noise[start : start + parameter.numel()].to(parameter.device)
            parameter.grad = parameter.summed_grad + part.view_as(parameter)
            start += parameter.numel()

    def scale_grad(self) -> None:
        """Divide by the public batch size, whatever number of patients was really there."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size

    @staticmethod
    def _by_patient(parameter: nn.Parameter, patients: int) -> Tensor:
        samples: Tensor = parameter.grad_sample.float()  # type: ignore[attr-defined]
        rows, left_over = divmod(len(samples), patients)
        if left_over or not rows:
            raise ModelError(
                f"a layer of shape {tuple(parameter.shape)} saw {len(samples)} rows of {patients} "
                "patients; expected as many rows of each, or no patient's gradient can be told"
            )
        if rows == 1:
            return samples
        return samples.view(patients, rows, *samples.shape[1:]).sum(dim=1)


class LocalTrainer:
    """Trains one run's network on one cohort; kept warm between rounds.

    Args:
        spec: the run.
        cohort: the site's training images; the caller has checked that it fits the spec.
        declared_size: the site's public, rounded number of units; the real one is never used.
        mechanism: noise and rate for this site (`accounting.planned`), or None for no privacy.
        compute: where and how much at once; None: the best device there is.

    Raises:
        ModelError: if the network cannot be trained soundly under DP; names the layer.
        SpecError: if the sampling rate is above 1.
        ValueError: if the mechanism is not one that the spec asks for, or float32 cannot carry
            its noise.
    """

    def __init__(
        self,
        spec: RunSpec,
        cohort: Cohort,
        *,
        declared_size: int,
        mechanism: SubsampledGaussian | None,
        compute: Compute | None = None,
    ) -> None:
        self._spec = spec
        self._cohort = rows_for(spec, cohort)
        self._synthetic: Cohort | None = None
        self._mechanism = mechanism
        self._rate = sampling_rate(spec, declared_size)
        _check_mechanism(mechanism, spec, self._rate)
        compute = compute or Compute(best_device())
        self._device = compute.device
        self._task = task_for(spec)
        self._network = models.build(spec).to(self._device)
        models.check_private(self._network)
        _hold_still(self._network, spec)
        learner = self._task.private(self._network)
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        self._physical_patients = _physical_patients(spec, compute)
        self._learner = _with_sample_gradients(learner) if mechanism else learner

    def mix_in(self, synthetic: Cohort | None) -> Self:
        """Have these images mixed in; the same trainer.

        Args:
            synthetic: the caller has checked that they fit the spec, and that no patient stands
                behind them; None where the run asks for none.

        Raises:
            CohortError: if there are fewer than the run expects in a batch.
        """
        if synthetic is None or not self._spec.augmentation.synthetic:
            return self
        rows = rows_for(self._spec, synthetic)
        check_enough(self._spec, rows)
        self._synthetic = rows
        return self

    def check(self, weights: Arrays) -> None:
        """Refuse global weights that are not exactly the network's, finite and of sane size.

        Raises:
            Refusal: with the code ``weights``.
        """
        check_weights(weights, {name: tuple(p.shape) for name, p in self._named()})

    def train(self, weights: Arrays, round_number: int, keystream: Keystream) -> LocalResult:
        """Run the round's local steps from the global `weights`.

        Args:
            weights: float32 arrays by parameter name, exactly the network's.
            round_number: from 1; only the learning rate depends on it.
            keystream: randomness of this attempt, made in this process.

        Raises:
            Refusal: if the weights are of another shape, not finite or absurdly large.
        """
        self._load(weights)
        self._task = task_for(self._spec)  # what it keeps is of one round
        self._network.train()
        optimizer = self._optimizer(keystream.derive("noise"))
        self._keep_zeros(optimizer)
        sampling, looks = keystream.derive("sampling"), keystream.derive("augmentation")
        following, mixing = keystream.derive("following"), keystream.derive("synthetic")
        generator = torch.Generator().manual_seed(looks.seed())
        losses: list[Tensor] = []
        sampled: list[int] = []
        with torch.random.fork_rng(devices=[], enabled=True):
            torch.manual_seed(keystream.derive("dropout").seed())
            for step in range(self._spec.local.steps):
                _set_rate(optimizer, self._spec.learning_rate(round_number, step))
                rows = self._sample(sampling)
                self._begin(optimizer)
                losses += self._add(optimizer, self._cohort, rows, generator)
                self._add_synthetic(optimizer, mixing)
                self._finish(optimizer, weights)
                self._follow(following)
                sampled.append(len(rows))
        return LocalResult(
            update=self._update(weights),
            drawn=self._drawn(len(sampled)),
            mean_loss=float(torch.cat(losses).mean()) if losses else float("nan"),
            sampled=tuple(sampled),
            zeroed=getattr(optimizer, "zeroed", 0),
        )

    def _keep_zeros(self, optimizer: Any) -> None:
        """In a sparse run, note which weights are zero now, in the global model: a public thing."""
        if not self._spec.model.sparse:
            return
        self._zeros = [(parameter, parameter.detach() != 0) for _, parameter in self._named()]
        if isinstance(optimizer, PatientOptimizer):
            kept = {id(parameter): mask for parameter, mask in self._zeros}
            optimizer.learned = [kept[id(parameter)] for parameter in optimizer.params]

    def _sample(self, keystream: Keystream) -> NDArray[np.int64]:
        """One random image or study for each patient that the Poisson draw took."""
        patients = np.flatnonzero(keystream.uniform(len(self._cohort.patients)) < self._rate)
        images = [self._cohort.rows_of(int(patient)) for patient in patients]
        chosen = keystream.below(np.array([len(rows) for rows in images], dtype=np.int64))
        pairs = zip(images, chosen, strict=True)
        rows = np.array([rows[which] for rows, which in pairs], dtype=np.int64)
        return self._cohort.drawn(rows, keystream.below)

    def _begin(self, optimizer: Any) -> None:
        private = isinstance(optimizer, PatientOptimizer)
        optimizer.begin() if private else optimizer.zero_grad()

    def _add(
        self, optimizer: Any, cohort: Cohort, rows: NDArray[np.int64], generator: torch.Generator
    ) -> list[Tensor]:
        """Add to a logical batch, in physical batches; returns a loss for each row."""
        losses = []
        private = isinstance(optimizer, PatientOptimizer)
        for part in _parts(rows, self._physical_patients):
            loss = self._losses(cohort, part, generator)
            total = loss.sum() if private else loss.sum() / _normaliser(self._spec)
            _backward(total)
            if private:
                optimizer.accumulate(len(part))
            losses.append(loss.detach().cpu())
        return losses

    def _add_synthetic(self, optimizer: Any, keystream: Keystream) -> None:
        """Add synthetic images to a logical batch, clipped as a patient's is.

        Which they are, and how they are changed, has randomness of its own: nothing of the sum
        that they add depends on the patients of the batch, so it moves by no more than C as before.
        """
        wanted = self._spec.augmentation.synthetic
        if not wanted:
            return
        if self._synthetic is None:
            raise ValueError(f"augmentation.synthetic = {wanted}: no synthetic cohort is mixed in")
        with torch.random.fork_rng(devices=[], enabled=True):
            torch.manual_seed(keystream.seed())
            generator = torch.Generator().manual_seed(keystream.seed())
            taken = keystream.uniform(len(self._synthetic)) < wanted / len(self._synthetic)
            rows = np.flatnonzero(taken)
            chosen = self._synthetic.drawn(rows.astype(np.int64), keystream.below)
            self._add(optimizer, self._synthetic, chosen, generator)

    def _finish(self, optimizer: Any, weights: Arrays) -> None:
        if isinstance(optimizer, PatientOptimizer):
            optimizer.add_noise()
            optimizer.scale_grad()
        self._apply(optimizer, weights)

    def _losses(
        self, cohort: Cohort, rows: NDArray[np.int64], generator: torch.Generator
    ) -> Tensor:
        """(patients,) losses, each the mean over the copies of that patient's image."""
        task, copies = self._task, self._spec.augmentation.multiplicity
        images, targets = task.taken(cohort, rows, copies, generator)
        images, motion = augment(images, self._spec.augmentation, generator)
        targets = task.moved(targets, motion).to(self._device)
        with torch.no_grad():
            seen, wanted = task.examples(images.to(self._device), targets, self._network, generator)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half_precision):
            outputs = self._learner(normalise(seen, self._spec.input))
        losses = task.losses(outputs.float(), wanted)
        if losses.shape != (len(rows) * copies * task.views,):
            raise ModelError(
                f"losses of shape {tuple(losses.shape)} for {len(rows)} patients of {copies} "
                f"copies and {task.views} views: expected one number a row, or no patient's "
                "gradient could be told from another's"
            )
        return losses.view(-1, copies, task.views).sum(2).mean(1)

    def _follow(self, keystream: Keystream) -> None:
        """What the task does after a step, with Opacus' hooks off and randomness of its own."""
        if isinstance(self._learner, GradSampleModule):
            self._learner.disable_hooks()
        try:
            with torch.random.fork_rng(devices=[], enabled=True):
                torch.manual_seed(keystream.seed())
                generator = torch.Generator().manual_seed(keystream.seed())
                self._task.follow(self._network, generator)
        finally:
            if isinstance(self._learner, GradSampleModule):
                self._learner.enable_hooks()
        with torch.no_grad():
            for parameter, mask in self._zeros:
                parameter.mul_(mask)

    def _apply(self, optimizer: Any, weights: Arrays) -> None:
        """The optimiser's step on the noised mean, with FedProx's pull back to the global model."""
        strategy = self._spec.aggregation
        if isinstance(strategy, FedProx):
            learned = set(_learned(self._learner))
            for name, parameter in self._named():
                if parameter not in learned:
                    continue
                anchor = torch.from_numpy(np.array(weights[name])).to(parameter.device)
                parameter.grad = _gradient(parameter) + strategy.mu * (parameter.detach() - anchor)
        for parameter, mask in self._zeros:
            if parameter.grad is not None:  # with the noise in it, and the pull
                parameter.grad.mul_(mask)
        getattr(optimizer, "original_optimizer", optimizer).step()

    def _optimizer(self, keystream: Keystream) -> Any:
        inner = _plain_optimizer(self._spec, _learned(self._learner))
        privacy = self._spec.privacy
        if self._mechanism is None or not isinstance(privacy, DpSgd):
            return inner
        return PatientOptimizer(
            inner,
            noise_multiplier=self._mechanism.noise_multiplier,
            clip_norm=privacy.clip_norm,
            normaliser=_normaliser(self._spec),
            keystream=keystream,
        )

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter of the whole network, by the name that messages have for it."""
        return list(self._network.named_parameters())

    def _load(self, weights: Arrays) -> None:
        self.check(weights)
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(torch.from_numpy(np.array(weights[name])))

    def _update(self, weights: Arrays) -> dict[str, NDArray[np.float32]]:
        return {
            name: parameter.detach().cpu().numpy() - weights[name]
            for name, parameter in self._named()
        }

    def _drawn(self, steps: int) -> SubsampledGaussian | None:
        if self._mechanism is None:
            return None
        return replace(self._mechanism, sampling_rate=self._rate, steps=steps)

    @property
    def _half_precision(self) -> bool:
        wanted = self._spec.local.precision == "bfloat16"
        return wanted and self._device.type == "cuda" and torch.cuda.is_bf16_supported()


def _normaliser(spec: RunSpec) -> int:
    """The public number of rows expected in a batch: of patients, and of synthetic images."""
    return spec.local.batch_size + spec.augmentation.synthetic


def best_device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_weights(weights: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse global weights that are not exactly the network's, finite and of sane size.

    Raises:
        Refusal: with the code ``weights``.
    """
    if set(weights) != set(shapes):
        odd = sorted(set(weights) ^ set(shapes))[:3]
        raise Refusal(RefusalCode.WEIGHTS, f"parameters differ from the network's: {odd}")
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            seen = f"{array.dtype}{list(array.shape)}"
            raise Refusal(RefusalCode.WEIGHTS, f"{name}: {seen}, expected float32{list(shape)}")
        if not np.all(np.abs(array) <= LARGEST_WEIGHT):
            raise Refusal(RefusalCode.WEIGHTS, f"{name}: not finite, or beyond {LARGEST_WEIGHT:g}")


def _check_mechanism(mechanism: SubsampledGaussian | None, spec: RunSpec, rate: float) -> None:
    """A trainer without the noise that its spec asks for would release in the clear."""
    private = isinstance(spec.privacy, DpSgd)
    if private != (mechanism is not None) or (mechanism and mechanism.sampling_rate != rate):
        raise ValueError(
            f"mechanism = {mechanism}: expected that of the spec, {spec.privacy.mechanism!r}, at a "
            f"sampling rate of {rate:.4g}; take it from `accounting.planned`"
        )
    if mechanism is not None and isinstance(spec.privacy, DpSgd):
        _check_scale(mechanism.noise_multiplier, spec.privacy.clip_norm)


def _check_scale(noise_multiplier: float, clip_norm: float) -> None:
    """Noise that rounds to zero, or a bound that rounds up, would release in the clear."""
    deviation = noise_multiplier * clip_norm
    if not all(_SMALLEST_SCALE <= scale <= _LARGEST_SCALE for scale in (clip_norm, deviation)):
        raise ValueError(
            f"clip_norm = {clip_norm:g}, noise of deviation {deviation:g}: expected both within "
            f"{_SMALLEST_SCALE:g} to {_LARGEST_SCALE:g}, which float32 carries with all its digits"
        )


def _backward(total: Tensor) -> None:
    """Backward through Opacus' hooks, which torch warns of on a network's first layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        total.backward()  # type: ignore[no-untyped-call]


def _with_sample_gradients(network: nn.Module) -> nn.Module:
    try:
        wrapped: nn.Module = GradSampleModule(
            network, batch_first=True, loss_reduction="sum", strict=True
        )
    except NotImplementedError as error:
        raise ModelError(f"this network cannot be trained under DP-SGD: {error}") from error
    return wrapped


def _hold_still(network: nn.Module, spec: RunSpec) -> None:
    """No gradient for what the run does not train (`models.learned`)."""
    learned = models.learned(spec)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in learned)


def _learned(learner: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in learner.parameters() if parameter.requires_grad]


def _plain_optimizer(spec: RunSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    chosen = spec.optimizer
    rate, decay = chosen.learning_rate, chosen.weight_decay
    if isinstance(chosen, Sgd):
        return torch.optim.SGD(parameters, lr=rate, momentum=chosen.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if chosen.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, betas=(chosen.beta1, chosen.beta2), weight_decay=decay)


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@lru_cache(maxsize=32)
def patient_bytes(spec: RunSpec) -> int:
    """What one more patient of a physical batch takes in training; no data is needed for it.

    A patient is an image, or those of a study, in as many copies and views as the run makes of it:
    they go through together. Counted is what stands between the images as a cohort gives them and
    the patient's gradient: copies, what the backward pass needs, what Opacus keeps, and under
    DP-SGD the gradient of each row. What is there once for a whole batch, as weights and the
    optimiser's state, is not.

    Raises:
        ModelError: as `models.build`, or if the network cannot be trained under DP-SGD.
    """
    private = isinstance(spec.privacy, DpSgd)
    network = models.outline(spec)
    _hold_still(network, spec)
    learner = task_for(spec).private(network)
    size = sum(parameter.numel() for parameter in _learned(learner))
    learner = _with_sample_gradients(learner) if private else learner
    settings, copies = spec.input, spec.augmentation.multiplicity
    places = (settings.places,) if settings.of_studies else ()

    def outputs_of(patients: int) -> Tensor:
        rows = patients * copies * spec.task.VIEWS
        images = torch.zeros(rows, *places, settings.channels, *settings.seen, device="meta")
        outputs: Tensor = learner(normalise(images, settings)).float()
        _backward(outputs.sum())
        return outputs

    one, two = (peak_bytes(partial(outputs_of, patients)) for patients in (1, 2))
    around = _IMAGE_COPIES * copies * settings.places * math.prod(settings.shape)
    around += _LOSS_COPIES * outputs_of(1).numel()
    if private and copies * spec.task.VIEWS * settings.places > 1:
        around += size  # a patient's rows are added up beside them
    if private and spec.local.precision == "bfloat16":
        around += size  # each is made float32 beside what it was
    return math.ceil(OF_KERNELS * (two - one)) + 4 * around


def _physical_patients(spec: RunSpec, compute: Compute) -> int:
    """How many patients go through at once; 1 to 512 where `compute` does not say."""
    if compute.physical_images is None:
        return min(512, max(1, compute.gradient_memory // patient_bytes(spec)))
    of_each = spec.augmentation.multiplicity * spec.task.VIEWS * spec.input.places
    return max(1, compute.physical_images // of_each)


def _norms(gradients: list[Tensor]) -> Tensor:
    """(patients,) L2 norms over all parameters.

    By blocks: one float32 sum over millions of numbers comes out up to 1e-4 too small, and by as
    much a patient would move the sum beyond C.
    """
    blocks = [b for g in gradients for b in torch.split(g.flatten(1), _NORM_BLOCK, dim=1)]
    norms: Tensor = torch.stack([block.norm(dim=1) for block in blocks]).norm(dim=0)
    return norms


def _parts(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)

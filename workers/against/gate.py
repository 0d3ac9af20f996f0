"""The gate on what came back: is this checkpoint that release in another form, and what is left of the adapter?"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from jobs.errors import (
    AuthError,
    BadInputError,
    MergefleetError,
    NotFoundError,
    ParityFailedError,
    TransientIOError,
    UnsupportedError,
)
from jobs.locations import LocalPath
from jobs.output_form import OutputForm
from jobs.parity_policy import DEFAULT_PROMPTS, ParityPolicy
from jobs.parity_report import ParityReport
from jobs.release import REPORT_NAME
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.against.accounts import Accounts, account
from workers.against.comparison import Comparison
from workers.against.configurations import compare_configurations
from workers.against.figures import Examiner, Figures, Model
from workers.against.foldings import Foldings, changed, explain, layer_of, ratios_of
from workers.against.question import Question, Watch
from workers.bases.forms.declared import declared_form
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantized_cache import QuantizedCache
from workers.files.checkpoint import read_checkpoint
from workers.files.local import file_errors
from workers.files.memory import hold_little
from workers.files.scratch import OwnedDirectory, sweep
from workers.merging.base_plan import BasePlan, plan_base
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.plain_base import write_plain_base
from workers.merging.settings import WorkerSettings
from workers.numerics.device import resolve_device
from workers.numerics.tiles import single_threads
from workers.parity.beside_release import Beside, Parties, Party, ask_beside
from workers.releases.delivery import verify_release
from workers.sources.belongings import is_tokenizer
from workers.sources.contents import open_contents
from workers.sources.fetch import Source, fetch_base
from workers.unit.checking import vet_checkpoint
from workers.unit.vetting import vet_base, vet_prompts

_CPU = torch.device("cpu")
_READ_BY = (
    "verify --against reads what a merge reads (docs/stored-forms.md): have the tool save compressed-tensors, AWQ "
    "(version gemm), ModelOpt or FP8, or compare another copy of the same"
)


def verify_against(question: Question, settings: WorkerSettings, watch: Watch) -> Comparison:
    """Compare a checkpoint with the verified release that it was made of.

    Args:
        question: what is compared.
        settings: cache, scratch, device and threads of this machine.
        watch: is told how far it is.

    Returns:
        What was found; it says whether that passes.

    Raises:
        BadInputError, UnsupportedError: the release is not what its manifest says, or stored in a form itself; the
            checkpoint is stored in a form that is not read, or contradicts itself; `base` is another one.
        NotFoundError, AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    with file_errors(f"making a directory in {settings.scratch}", settings.scratch):
        sweep(settings.scratch, "against-")
        owned = OwnedDirectory.make(settings.scratch, "against-")
    hold_little()
    try:
        return _Gate(question, settings, watch, owned.path).run()
    finally:
        owned.leave()


class _Gate:
    def __init__(self, question: Question, settings: WorkerSettings, watch: Watch, scratch: Path) -> None:
        self._checkpoint, self._release, self._asked_base = question.checkpoint, question.release, question.base
        self._question, self._settings, self._watch, self._scratch = question, settings, watch, scratch
        self._num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        self._why_no_base: str | None = None

    def run(self) -> Comparison:
        """Do all of it, in the order in which a fault costs least."""
        self._watch.step("verifying the release")
        self._manifest = verify_release(self._release, self._settings.scratch)
        if self._manifest.output not in (None, OutputForm.PLAIN):
            raise BadInputError(
                f"{self._release} is stored as {self._manifest.output} itself; name the release of the same adapter in "
                "16 bits, which the checkpoint was made of"
            )
        report = b"".join(open_contents(self._release, self._scratch).read(REPORT_NAME))
        self._report = ParityReport.model_validate_json(report)
        self._watch.step("fetching the release")
        release = self._planned(fetch_base(self._release, self._settings.cache), BaseQuantization.NONE)
        came_back = self._fetched()
        accounts, words = self._account(release, came_back)
        agreement = compare_configurations(release.source.directory, came_back.directory)
        found = functools.partial(
            Comparison,
            checkpoint=self._checkpoint,
            release=self._release,
            manifest=self._manifest,
            form=words,
            limits=self._question.limits,
            accounts=accounts,
            agreement=agreement,
        )
        if accounts.missing or accounts.misshapen:
            nothing = "tensors are missing, or have other shapes: nothing was measured"
            return found(base=None, why_no_base=nothing, why_no_behaviour=nothing)
        checkpoint = self._planned(came_back, BaseQuantization.STORED)
        base = self._base()
        figures, foldings = self._measure(release, checkpoint, base, accounts)
        if base is not None and (other := self._is_other(figures)):
            base = None
            if self._asked_base is not None:
                raise BadInputError(
                    f"--base {self._asked_base}: {other}; name the base that the release was merged into"
                )
            self._why_no_base = f"{other}; name the right one with --base"
            figures = [dataclasses.replace(each, delta=None, survival=None) for each in figures]
        behaviour, wrong = None, None
        why: str | None = "level: arithmetic was asked for"
        if self._question.level == "full":
            why = None if release.answers_prompts else "its model does not continue text"
        if why is None:
            try:
                behaviour = self._ask(release, checkpoint, base)
            except ParityFailedError as error:
                wrong = str(error)
        return found(
            base=None if base is None else base.source.location,
            why_no_base=self._why_no_base,
            figures=tuple(figures),
            foldings=foldings,
            behaviour=behaviour,
            wrong_behaviour=wrong,
            why_no_behaviour=why,
        )

    def _request(self, source: Source, quantization: BaseQuantization) -> MergeRequest:
        """Return a request that has weights of a base read; nothing is merged by it."""
        manifest = self._manifest
        adapter = manifest.adapter if manifest.adapter is not None else (manifest.adapters or ())[0].adapter
        of_base = quantization is manifest.base_quantization and quantization.converts
        options = manifest.quantization_options if of_base else None
        return MergeRequest(
            base=source.location,
            adapter=adapter,
            destination=LocalPath(self._scratch / "nothing"),
            base_quantization=quantization,
            quantization_options=options or QuantizationOptions(),
            parity=self._policy(source.directory),
        )

    def _policy(self, directory: Path) -> ParityPolicy:
        """Return the prompts that the release was proven on; the default ones where there are none."""
        gating = next((check for check in self._report.behaviour if check.gates), None)
        asked = () if gating is None else tuple(each.prompt for each in gating.prompts)
        has_tokenizer = any(is_tokenizer(path.name) for path in directory.iterdir())
        if not asked or not has_tokenizer or asked[: len(DEFAULT_PROMPTS)] == DEFAULT_PROMPTS:
            return ParityPolicy()
        return ParityPolicy(prompts=asked)

    def _planned(self, source: Source, quantization: BaseQuantization) -> BasePlan:
        request = self._request(source, quantization)
        vet_base(source, request)
        return plan_base(source, request)

    def _fetched(self) -> Source:
        """Bring the checkpoint."""
        self._watch.step("fetching the checkpoint")
        try:
            source = fetch_base(self._checkpoint, self._settings.cache)
            declared_form(source.directory)
            vet_checkpoint(source.directory)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self._checkpoint}: {error}. {_READ_BY}") from error
        return source

    def _account(self, release: BasePlan, came_back: Source) -> tuple[Accounts, str | None]:
        form = declared_form(came_back.directory)
        specs = {name: spec for name, (_, spec) in read_checkpoint(came_back.directory).tensors.items()}
        try:
            in_form = {} if form is None else form.weights(specs)
        except MergefleetError as error:
            raise type(error)(f"{self._checkpoint}: {error}") from error
        return account(release, specs, in_form), None if form is None else form.words

    def _base(self) -> BasePlan | None:
        """Plan what the release was merged into; None, and why, where it cannot be had."""
        self._watch.step("fetching the base")
        place = self._asked_base or self._manifest.base
        try:
            return self._planned(fetch_base(place, self._settings.cache), self._manifest.base_quantization)
        except (AuthError, NotFoundError, TransientIOError, UnsupportedError) as error:
            if self._asked_base is not None:
                raise
            self._why_no_base = f"the base cannot be had ({error}); name where it is with --base"
            return None

    def _measure(
        self, release: BasePlan, checkpoint: BasePlan, base: BasePlan | None, accounts: Accounts
    ) -> tuple[list[Figures], Foldings]:
        checks = self._report.tensors
        targeted = {check.tensor for check in checks if check.targeted}
        examiner = Examiner(
            self._model(release),
            self._model(checkpoint),
            None if base is None else self._model(base),
            # Reports of the first versions do not say what is targeted.
            touched=targeted or {check.tensor for check in checks if check.changed},
            on_bytes=self._watch.advance,
        )
        self._watch.expect(sum(release.by_name[pair.release].num_bytes for pair in accounts.pairs))
        self._watch.step("comparing tensors")
        small = [pair for pair in accounts.pairs if len(release.by_name[pair.release].shape) < 2]
        large = [pair for pair in accounts.pairs if len(release.by_name[pair.release].shape) >= 2]
        with single_threads(self._num_threads, "against") as pool:
            of_small = list(pool.map(lambda pair: examiner.examine(pair, {}), small))
            others = [
                changed(each.pair.release, *examiner.values(each.pair)) for each in of_small if each.num_different
            ]
            ratios = ratios_of(others)
            of_large = list(
                pool.map(lambda pair: examiner.examine(pair, ratios.get(layer_of(pair.release), {})), large)
            )
        figures = [*of_small, *of_large]
        return figures, explain(figures, others)

    def _model(self, plan: BasePlan) -> Model:
        quantized: QuantizedBase | None = None
        if plan.form is not None:
            quantized = plan.stored_weights(_CPU)
        elif plan.quantization is not None:
            self._watch.step("quantizing the base as the merge did")
            cache = QuantizedCache(self._settings.cache / "quantized", _CPU, self._num_threads)
            quantized = cache.open(
                plan.quantization, lambda _: self._watch.step("quantizing the base as the merge did")
            )
        if quantized is not None:
            quantized.hold(whole=False)
        return Model(plan=plan, reader=ArithmeticCheck(plan, quantized, _CPU))

    def _is_other(self, figures: Sequence[Figures]) -> str | None:
        """Say why a base is not the one: what the adapter left alone is as it was."""
        if self._manifest.dtype is not None:
            return None
        changes = {check.tensor: check.changed for check in self._report.tensors}
        for each in figures:
            if each.delta and not changes.get(each.pair.release, True):
                return f"it is another base: the adapter changed nothing of {each.pair.release}, and it differs there"
        return None

    def _ask(self, release: BasePlan, checkpoint: BasePlan, base: BasePlan | None) -> Beside:
        directory = release.source.directory
        request = self._request(release.source, BaseQuantization.NONE)
        vet_prompts(request, directory, directory)
        asked = request
        if base is not None:
            asked = self._request(base.source, self._manifest.base_quantization).model_copy(
                update={"parity": request.parity}
            )
        return ask_beside(
            Parties(
                release=directory,
                checkpoint=self._party(checkpoint),
                base=None if base is None else self._party(base),
            ),
            asked,
            resolve_device(self._settings.device),
            self._scratch,
            step=self._watch.step,
        )

    def _party(self, plan: BasePlan) -> Party:
        def write(target: Path) -> None:
            write_plain_base(plan, target, _CPU, lambda: None)

        return Party(directory=plan.source.directory, write_plain=None if plan.misread is None else write)

"""The head of a language model: stored, tied to the embedding, or neither."""

from collections.abc import Iterator

from workers.bases.model import token_embedding
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity
from workers.releases.checks.skeletons import Skeleton, about

NO_HEAD = Rule(
    id="tensors.no-head",
    what="no head is stored, and the configuration ties none",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM,),
    misread_by=(*TRANSFORMERS, Engine.SGLANG, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="store the head, or set tie_word_embeddings to true where the model was trained with both as one",
    source="vLLM issue 16555; vLLM "
    "vllm/model_executor/model_loader/default_loader.py DefaultModelLoader.track_weights_loading",
)
TIED_HEAD = Rule(
    id="tensors.tied-head",
    what="a head is stored that the configuration ties to the embedding",
    severity=Severity.WARNING,
    misread_by=SERVERS,
    advice="where the two differ, set tie_word_embeddings to false: transformers 5 keeps both, vLLM and SGLang leave "
    "the stored head out; where they are equal, leave the head out",
    source="vLLM issue 51063 and pull request 6758; SGLang python/sglang/srt/models/llama.py "
    "LlamaForCausalLM.load_weights; transformers 5.23 modeling_utils.py PreTrainedModel.tie_weights",
)


def head_of(skeleton: Skeleton) -> str | None:
    """Return the name of the weight that makes logits of a decoder; None where there is none."""
    if getattr(skeleton.model.config, "is_encoder_decoder", False) or not skeleton.model.can_generate():
        return None
    head = skeleton.model.get_output_embeddings()
    if head is None:
        return None
    return next((f"{name}.weight" for name, module in skeleton.model.named_modules() if module is head), None)


def find_tied(skeleton: Skeleton, head: str | None) -> Iterator[Finding]:
    """Find a head that is stored though it is tied: whether it is the embedding once more, only its values tell."""
    embedding, _ = token_embedding(skeleton.model)
    ties = skeleton.model.all_tied_weights_keys
    if head is None or embedding is None or not {head, embedding} <= skeleton.sources.keys():
        return
    if head != embedding and ties.get(head) == embedding:
        name = skeleton.sources[head][0]
        yield about(skeleton, TIED_HEAD, name, found="it, beside the embedding", expected="one of the two")

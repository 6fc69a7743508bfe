"""`LudwigModel.generate`: texts in, texts out, with no dataset and no template around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ludwig_peft_plugin.model.llm import PeftLLM


def generate_texts(
    llm: PeftLLM, texts: str | list[str], generation_config: dict[str, Any] | None = None, *, streaming: bool = False
) -> str | list[str]:
    """Continue each text and return the texts with their continuations, special tokens left out.

    Args:
        llm: the model.
        texts: one text or several; one text returns one text.
        generation_config: overrides of the config's `generation` section for this call.
        streaming: print each answer to standard output while it is made, one text after the other.
    """
    from transformers import TextStreamer

    from ludwig_peft_plugin.data.tokens import encode_prompts
    from ludwig_peft_plugin.model.generation import generate_answers

    prompts = encode_prompts(llm.tokenizer, [texts] if isinstance(texts, str) else list(texts))
    rows = [prompts[row] for row in range(len(prompts))]
    # A streamer follows one text, so streaming goes one by one.
    streamer = TextStreamer(llm.tokenizer, skip_prompt=True) if streaming else None
    training = llm.training
    llm.eval()
    try:
        with llm.use_generation_config(generation_config):
            answers = generate_answers(
                llm.model,
                rows,
                llm.generation,
                device=llm.curr_device,
                batch_size=1 if streaming else None,
                streamer=streamer,
            )
    finally:
        llm.train(training)
    outputs: list[str] = [
        llm.tokenizer.decode([*ids.tolist(), *answer.tokens.tolist()], skip_special_tokens=True)
        for ids, answer in zip(rows, answers, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else outputs

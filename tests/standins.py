"""Random-weight models of three families, made in a second: fair for plumbing, speed and memory, never for quality.

They end an answer at about every twelfth token; a model that never ends one has all its completions cut, and learns nothing.

    python tests/standins.py FOLDER [--family qwen3] [--size 42m]

Each has the architecture of its family, a byte-level BPE tokenizer of about 1,500 tokens trained on our own texts, and
the family's rules for beginning-of-sequence tokens and chat templates, written here from their public description.
"""
import argparse
import json
import re
from pathlib import Path

FAMILIES = ("qwen3", "gemma2", "llama")
CONTEXT = 4096
VOCAB = 1500

# width and depth; `small` is for tests, `42m` has about 42 million parameters
SIZES = {
    "small": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "42m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=13, num_attention_heads=8, num_key_value_heads=4, head_dim=64),
}

# Qwen3: no BOS; with thinking off, the prompt ends in an empty think block.
QWEN3_CHAT = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

# Gemma: BOS in the template, `model` for the assistant, strictly alternating turns, no system role.
GEMMA2_CHAT = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Llama 3: BOS in the template, a system turn always present, contents trimmed, and today's date unless one is given.
LLAMA_CHAT = """\
{{- bos_token }}
{%- if not date_string is defined %}
{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# special tokens in the order of their ids; bos = put in front by the tokenizer itself; ends = end a generation, the last one a turn
RULES = {
    "qwen3": dict(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], plain=["<think>", "</think>"], chat=QWEN3_CHAT,
                  bos=None, eos="<|im_end|>", pad="<|endoftext|>", ends=["<|endoftext|>", "<|im_end|>"]),
    "gemma2": dict(special=["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], plain=[], chat=GEMMA2_CHAT,
                   bos="<bos>", eos="<eos>", pad="<pad>", ends=["<eos>", "<end_of_turn>"]),
    "llama": dict(special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], plain=[],
                  chat=LLAMA_CHAT, bos="<|begin_of_text|>", eos="<|eot_id|>", pad=None, ends=["<|end_of_text|>", "<|eot_id|>"]),
}


def texts():
    "What the tokenizers learn from: every text that ships as data, a line each"
    import hmx_feel
    data = Path(hmx_feel.__file__).parent
    files = sorted(p for kind in ("prompts", "rubrics") for p in (data / kind).glob("*") if p.suffix in (".jsonl", ".yaml"))
    return [line for p in files for line in p.read_text(encoding="utf-8").splitlines() if line.strip()]


def make_tokenizer(family, corpus=None, split_labels=False):
    """A fast tokenizer with the family's special tokens and chat template.

    split_labels: write a digit with two tokens, a word mark and the digit, as older SentencePiece tokenizers do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    rule = RULES[family]
    tok = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    digits = pre_tokenizers.Digits(individual_digits=True)
    if split_labels:
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), digits])
        tok.decoder, alphabet = decoders.Metaspace(prepend_scheme="always"), sorted({*map(chr, range(32, 127)), "▁", "\n"})
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tok.decoder = decoders.ByteLevel()
    special = rule["special"] + rule["plain"]
    tok.train_from_iterator(texts() if corpus is None else corpus,
                            trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if rule["bos"]:
        tok.post_processor = processors.TemplateProcessing(single=f"{rule['bos']} $A", pair=f"{rule['bos']} $A {rule['bos']} $B",
                                                           special_tokens=[(rule["bos"], tok.token_to_id(rule["bos"]))])
    names = {f"{k}_token": rule[k] for k in ("bos", "eos", "pad") if rule[k]}
    out = PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **names)
    out.add_special_tokens({"additional_special_tokens": [t for t in rule["special"] if t not in names.values()]}, replace_extra_special_tokens=False)
    out.chat_template = rule["chat"]
    return out


def make_config(family, tok, size="small"):
    "The configuration of a stand-in"
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    shape = dict(SIZES[size], vocab_size=len(tok), max_position_embeddings=CONTEXT, **ids)
    if family == "qwen3": return Qwen3Config(**shape, tie_word_embeddings=True)
    if family == "llama": return LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=500000.0)
    # a window far shorter than the context, so that sliding layers really forget
    return Gemma2Config(**shape, sliding_window=64, query_pre_attn_scalar=shape["head_dim"], attn_logit_softcapping=50.0,
                        final_logit_softcapping=30.0)


def let_it_end(net, end, size, every=12):
    """Give the token `end` a chance of about 1 in `every` at each place, whatever was said before.

    The embeddings are tied to the output, so one dimension can be a bias: `size` in every token, which the layers change
    little, and in `end` what it takes on random texts.
    """
    import torch
    rows = net.get_input_embeddings().weight
    some = torch.randint(0, len(rows), (8, 64), generator=torch.Generator().manual_seed(0))
    some[some == end] += 1 if end == 0 else -1
    with torch.no_grad():
        rows[:, 0], rows[end, 0] = size, 0
        hidden = net.model(input_ids=some).last_hidden_state
        logits, low, high = net(input_ids=some).logits, 0., 100.
        for _ in range(40):
            rows[end, 0] = (low + high) / 2
            chance = torch.sigmoid(hidden @ rows[end] - logits.logsumexp(-1)).mean()
            low, high = (rows[end, 0].item(), high) if chance < 1 / every else (low, rows[end, 0].item())


def exactly(trainer, tok, n):
    "Let every completion of a trainer have n tokens: whole words, then the end of the turn"
    words = {i for t, i in tok.get_vocab().items() if re.fullmatch("Ġ[a-z]+", t)}
    how = trainer.generation_config
    how.min_new_tokens, how.forced_eos_token_id = n - 1, tok.eos_token_id
    how.suppress_tokens = sorted(set(range(len(tok))) - words - {tok.eos_token_id})


def make_standin(family, folder, size="small", split_labels=False, seed=0, corpus=None):
    "Write a stand-in as a folder that from_pretrained can read; returns the folder"
    import torch
    from transformers import AutoModelForCausalLM
    if family not in FAMILIES: raise ValueError(f"family: found {family!r}, allowed: {', '.join(FAMILIES)}")
    folder, tok = Path(folder), make_tokenizer(family, corpus, split_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(make_config(family, tok, size), attn_implementation="eager", dtype=torch.float32)
    let_it_end(net, tok.convert_tokens_to_ids(RULES[family]["ends"][-1]), 1 if family == "gemma2" else .1)   # Gemma's layers write more
    net.generation_config.eos_token_id = sorted(tok.convert_tokens_to_ids(RULES[family]["ends"]))
    net.save_pretrained(folder, safe_serialization=True)
    tok.save_pretrained(folder)
    return folder


def without(folder, copy, *, file=None, chat_template=False):
    "A copy of a model folder that lacks a file, or its chat template"
    import shutil
    copy = Path(shutil.copytree(folder, copy))
    if file: (copy / file).unlink()
    if chat_template:
        (copy / "chat_template.jinja").unlink(missing_ok=True)
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    return copy


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("folder", help="where to write; each family gets a folder of its own inside")
    ask.add_argument("--family", choices=FAMILIES, help="default: all three")
    ask.add_argument("--size", choices=SIZES, default="small")
    given = ask.parse_args()
    for name in [given.family] if given.family else FAMILIES: print(make_standin(name, Path(given.folder) / f"{name}-{given.size}", given.size))

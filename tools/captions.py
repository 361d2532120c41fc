"""Write a manifest with new captions, made from its captions, descriptions or audio.

python -m tools.captions rewrite --task negatives --data data/audiocaps --out data/order
python -m tools.captions rewrite --task clean --data data/fsd50k --llm HUB_ID --out data/clean
python -m tools.captions recaption --data data/audioset --model CKPT --out data/captioned
"""

import argparse
import collections
import functools
import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import eval as evaluation
from tools.datasets import (
    check_output,
    file_hash,
    read_text,
    stem_of,
    with_durations,
    write_manifest,
)

# ------------------------------------------------------------------------------------------------
# Rewritten captions: rules that reverse the order of events
# ------------------------------------------------------------------------------------------------

CONNECTIVE = re.compile(
    r"(?:,? (?:and |but )?(?:then )?(after which|(?<=and )later|(?<!then )then),?"
    r"|,? (?:then )?(?:shortly |soon |closely |immediately )?(followed by)"
    r"|(?<! and) (?:just |right |shortly |soon |immediately |directly |not long |long |well )?"
    r"(?:even )?(before|after)) "
)
OPPOSITE = {"before": "after", "after": "before"}
# Events with one of these words are not reordered: the word refers to an earlier event, states a
# time, or introduces a further event whose place in the order is uncertain
BOUND = """again another more most other others also still too same each one off back once together
    turn turns down first second third last next whole time moment moments seconds minutes afterward
    afterwards before after then later until now only different louder softer quieter closer faster
    slower higher lower as while when where during if so than it he she they him her his its their
    them this that these those which who what has have does""".split()
BOUND_STEMS = """start begin stop ceas end finish final fad subsid continue continuing resum repeats
    return respon repl answer react echo imitat interrupt join chang becom get increas decreas
    eventual follow preced meanwhile silent throughout""".split()
# No verb comes right after these: "two loud honks", "the sound of beeps"
BEFORE_NOUNS = """a an the of in on at by with from to and or for into over some several many few
    multiple two three four five loud soft light low high pitched long short quick brief small large
    big heavy sharp faint distant rapid deep electronic mechanical digital""".split()
PLURAL = ["people", "men", "women", "children", "sheep"]
# "a man then a woman talking": the first event has no verb of its own
NO_EVENT = [*PLURAL, "man", "woman", "person", "child", "boy", "girl", "male", "female", "dog"]
BE = ["is", "are", "was", "were"]
VERBS = """accelerate applaud approach bang bark beep blare blast bleat blow break breathe burp
    burst buzz call chant chime chirp chuckle clang clank clap click clink clop close come coo cough
    crack crackle crash crinkle croak crumple cry cut ding drain drill drip drive drop explode fall
    fill fire flow flush fly giggle give go groan growl grunt gurgle happen hiss hit honk hover howl
    hum idle laugh make meow move narrate neigh occur oink open operate pass play pop pour quack
    race rev ring roar roll rub rumble run rush rustle say scream screech sew shoot shout shuffle
    shut sing sizzle skid slam slide slow smack snap sneeze snore speak speed spin splash spray
    squeak squeal step stutter swish take talk tap thump tick trickle tweet type vibrate vocalize
    wail walk whimper whine whisper whistle whoosh work yell""".split()
THIRD = {form: verb for verb in VERBS for form in (verb + "s", verb + "es", verb[:-1] + "ies")}


def find_verb(words: list[str]) -> int | None:
    """Index of an event's verb; 0: a noun phrase ("a bark", "a dog barking"); None: uncertain."""
    no_subject = words[0] in [*VERBS, *THIRD, *BE, "there", "in", "with"] or words[0].endswith("ly")
    if no_subject or words[-1] in [*NO_EVENT, *BE, "and", "or"]:
        return None
    singular = words[0] in ("a", "an", "someone", "somebody", "something")
    participle = False
    for i in range(1, len(words)):
        before = words[i - 2] if i > 1 and words[i - 1].endswith("ly") else words[i - 1]
        if before in BEFORE_NOUNS:
            continue
        plural = before in PLURAL or re.search("[^s]s$", before)
        singular_verb = words[i] in THIRD and not plural
        plural_verb = words[i] in VERBS and (plural or "and" in words[:i])
        if singular_verb or plural_verb or words[i] in BE:
            return None if participle else i
        if words[i].endswith("ing"):
            participle = True
        elif singular and not participle and re.search("[^su]s$|ed$", words[i]):
            return None  # perhaps a verb that is not in the list
    return 0


def as_noun(words: list[str]) -> str | None:
    """An event as a noun phrase: "a man speaks" -> "a man speaking"; None: uncertain."""
    i = find_verb(words)
    if i and "and" not in words:
        verb = THIRD.get(words[i], words[i])
        if verb in BE:  # "a man is speaking", "a door is opened"
            new = [] if any(word.endswith("ing") for word in words[i + 1 : i + 3]) else ["being"]
        elif re.fullmatch("[^aeiou]*[aeiou][bdgmnprtv]|occur", verb):
            new = [verb + verb[-1] + "ing"]
        else:
            new = [verb.removesuffix("e") + "ing"]
        words = words[:i] + new + words[i + 1 :]
    return " ".join(words) if find_verb(words) == 0 else None


def reverse_order(caption: str) -> tuple[str | None, str]:
    """A caption -> (same events in the opposite order or None, the connective or the reason)."""
    text = " ".join(caption.split())
    body = text.rstrip(". ")
    if not re.match("[A-Z][A-Z]|English|Christmas|Morse", body):
        body = body[:1].lower() + body[1:]
    matches = list(CONNECTIVE.finditer(body))
    if len(matches) != 1:
        return None, "several orders" if matches else "no ordering connective"
    joint, name = matches[0][0], matches[0][matches[0].lastindex]
    left, right = body[: matches[0].start()], body[matches[0].end() :]
    first, second = left.split(), right.split()
    if re.search(r"[^\w '-]", left + right) or not first or not second:
        return None, "commas or other signs within an event"
    if any(word in BOUND or word.startswith(tuple(BOUND_STEMS)) for word in first + second):
        return None, "a word bound to its place"
    stems = {word[:4] for word in first}.difference(BEFORE_NOUNS)
    others = {word[:4] for word in second}.difference(BEFORE_NOUNS)
    if stems <= others or others <= stems:
        return None, "two events alike"

    verb, other = find_verb(first), find_verb(second)
    if name == "followed by":
        left = as_noun(first)
        same_shape = left and other == 0
    elif verb == other == 0:  # not "a man speaking then laughing": no second subject
        same_shape = not first[0].endswith("ing") and not second[0].endswith("ing")
    else:
        same_shape = verb and other
    # "the engine" refers to an earlier mention
    if same_shape and not re.search(r"\bthe (?!background|distance)", right):
        result = right + joint + left
    elif name in OPPOSITE:
        result = left + joint.replace(name, OPPOSITE[name]) + right
    else:
        return None, "sides of unlike shape"
    if text[0].isupper():
        result = result[0].upper() + result[1:]
    return result + ("." if text.endswith(".") else ""), name


# ------------------------------------------------------------------------------------------------
# Rewritten captions: a language model, imported texts, the command
# ------------------------------------------------------------------------------------------------

NEGATIVES_PROMPT = """A caption tells what is heard in a recording. Rewrite it so that the same \
events happen in the opposite order in time. Keep every event and its words, change nothing but \
the order, and use the connectives of the caption. \
If its events happen at the same time, or there is only one, answer NONE. Answer with one line.

Caption: A dog barks, then a car passes by
Answer: A car passes by, then a dog barks

Caption: A man speaks followed by a door closing
Answer: A door closing followed by a man speaking

Caption: A woman sings while people clap
Answer: NONE

Caption: Water runs before a toilet flushes and a man coughs
Answer: A toilet flushes and a man coughs before water runs

Caption: {caption}
Answer:"""


GLUE = set(
    """
    a an the and or but then of in on at by with to as while is are was were be being been it he she
    they his her its their some there after afterwards before when until which that who later first
    once finally followed following preceded
    """.split()
)


def plain(words: list[str]) -> list[str]:
    return [re.sub(r"^\W+|\W+$", "", word).lower() for word in words]


def content(words: list[str]) -> list[str]:
    """Stems of the content words, without function words ("barks", "barking" -> "bark")."""
    stems = [
        re.sub(r"(?<=\w\w)(?:ing|ies|es|ed|(?<!s)s)$", "", word)
        for word in plain(words)
        if word and word not in GLUE
    ]
    return [
        re.sub(r"([bdglmnprtv])\1$", r"\1", re.sub(r"(?<=\w\w)[ey]$", "", stem)) for stem in stems
    ]


def tells_backwards(text: str) -> bool:
    """Whether a text names the later event first: "A after B", "before B, A"."""
    return (
        len(
            re.findall(
                r"(?<=[\w,] )(?:after(?! (?:which|that))|preceded by)\b|^before\b", text.lower()
            )
        )
        % 2
        == 1
    )


def check_order(caption: str, answer: str) -> tuple[str | None, str | None]:
    """A model's answer to NEGATIVES_PROMPT -> (negative or None, reason for rejection or None). The
    answer NONE (no order) is not a rejection.

    Same events: caption and answer hold the same `content` words equally often (articles,
    connectives and pronouns do not count; endings -s -es -ed -ing -y -e and a doubled last
    consonant are cut). Other order: either these words stand in another order, or before and after
    are exchanged. Both together give the same order again.
    """
    answer = bare(answer)
    if re.match(NONE, answer, re.I):
        return None, None
    if not re.search(r"\w", answer):
        return None, "empty"
    if "\n" in answer:
        return None, "more than one line"
    if same_text(caption, answer):
        return None, "copy of the caption"
    own, new = content(caption.split()), content(answer.split())
    if collections.Counter(own) != collections.Counter(new):
        return None, "other events"
    if re.search(r"\b(while|as)\b", caption.lower()) and not re.search(ORDERED, caption.lower()):
        return None, "events at the same time"
    if (own != new) == (tells_backwards(caption) != tells_backwards(answer)):
        return None, "same order"
    return answer, None


NONE = r"none\b\W*(?:$|[:(.,-])"  # also with an explanation after it
ORDERED = r"\b(then|before|after|followed|preceded|later|first)\b"


def bare(answer: str) -> str:
    """A model's answer without the quotes, asterisks and label that it may stand in."""
    answer = answer.strip(' \n\t*"“”')
    return re.sub(r"^(caption|answer)\s*:", "", answer, flags=re.I).strip(' \n\t*"“”')


def same_text(a: str, b: str) -> bool:
    return re.findall(r"\w+", a.lower()) == re.findall(r"\w+", b.lower())


def load_llm(name: str, device: str):
    """Load a causal language model and its tokenizer from the hub or a folder: bfloat16 on a GPU,
    float32 on a CPU.
    """
    transformers, device = common.quiet_transformers(), common.start_device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=common.transformers_config(name),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--llm {name}: no causal language model and tokenizer, neither as a folder nor on the "
            f"hub ({reason}); give a folder "
            "with config.json, weights and tokenizer, or connect to a network"
        ) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--llm {name}: its tokenizer has neither a padding nor an end token, and batches "
                "need one of them"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def generate(llm, prompts: list[str], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """Answers to one batch of prompts, in the tokenizer's chat template if it has one;
    temperature 0: greedy.

    Above 0, sampling is over all tokens, without the model's own top-k and top-p. A model without a
    template continues the text, often with further examples; its answer is cut to the first line.
    """
    model, tokenizer = llm
    chat = tokenizer.chat_template is not None
    if chat:  # enable_thinking: some templates use it, the others ignore it
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(
        model.device
    )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    answers = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        answer.strip() if chat else (answer.strip().splitlines() or [""])[0] for answer in answers
    ]


def stored_answers(file: Path, key: dict, field: str) -> dict:
    """{(question, version): answer} of a file that `store_answers` wrote under the same settings
    `key`.

    An incomplete line, left by a killed run, is removed from the file and asked again.
    """
    answers, whole = {}, []
    for line in file.read_bytes().decode("utf-8", "replace").split("\n") if file.is_file() else []:
        try:
            record = json.loads(line)
            if {name: record.get(name) for name in key} == key:
                answers[record[field], record.get("version", 0)] = record["answer"]
            whole.append(line)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            continue  # blank or incomplete
    if file.is_file():
        common.write_lines(file, whole)
    return answers


def store_answers(file, key: dict, field: str, answers: dict) -> None:
    """Append a batch of {(question, version): answer} to an open JSON Lines file."""
    for (asked, version), answer in answers.items():
        file.write(
            json.dumps(
                {**key, field: asked, "version": version, "answer": answer}, ensure_ascii=False
            )
            + "\n"
        )
    file.flush()


def draw_seed(*parts) -> int:
    """A seed computed from `parts`: a batch draws the same whatever was asked before it."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def ask_llm(
    texts: list[str],
    prompt: str,
    args,
    cache: Path,
    field="caption",
    versions=1,
    temperature=0.0,
) -> dict:
    """{(text, version): answer} of args.llm to `prompt`, which holds {caption}; answers in `cache`
    are reused.

    The cache key is model, prompt hash, temperature and seed (null if greedy), text and version.
    The file is written after every batch, so a killed run continues where it stopped.
    """
    key = {
        "model": args.llm,
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "temperature": temperature or None,
        "seed": args.seed if temperature else None,
    }
    print(f"prompt {key['prompt']}, once a {field}:\n\n{prompt}\n")
    answers, asked = (
        stored_answers(cache, key, field),
        {(text, version) for text in texts for version in range(versions)},
    )
    # sorted by length for little padding. Every call makes the same batches, since a draw depends
    # on the whole batch; an incomplete batch is asked again
    ordered = sorted(set(texts), key=lambda text: (len(text), text))
    batches = [
        [(text, version) for text in ordered[i : i + args.batch_size]]
        for version in range(versions)
        for i in range(0, len(ordered), args.batch_size)
    ]
    todo = [batch for batch in batches if not set(batch) <= answers.keys()]
    n_todo = sum(map(len, todo))
    print(f"{cache}: {len(asked) - n_todo:,} of {len(asked):,} questions answered before")
    if todo:
        llm = load_llm(args.llm, args.device)
        with (
            open(cache, "a", encoding="utf-8") as file,
            tqdm(total=n_todo, desc=args.llm, unit=field) as bar,
        ):
            for batch in todo:
                torch.manual_seed(draw_seed(args.seed, batch))
                made = generate(
                    llm,
                    [prompt.replace("{caption}", text) for text, _ in batch],
                    96,  # tokens: a caption is shorter
                    temperature,
                )
                store_answers(file, key, field, dict(zip(batch, made)))
                answers |= dict(zip(batch, made))
                bar.update(len(batch))
    return answers


def checked_answers(pairs, check, rejects: Path, field="caption") -> dict:
    """{(asked, answer): text or None} by `check(asked, answer) -> (text, reason)`; rejected answers
    are counted and listed in a file.
    """
    results, rejected = {}, []
    for asked, answer in dict.fromkeys(pairs):
        results[asked, answer], reason = check(asked, answer)
        if reason:
            rejected.append({"reason": reason, field: asked, "answer": answer})
    print(
        f"{len(results):,} different answers: "
        f"{sum(text is not None for text in results.values()):,} taken, {len(rejected):,} rejected"
        + "".join(
            f"; {reason} {n:,}"
            for reason, n in collections.Counter(r["reason"] for r in rejected).most_common()
        )
    )
    common.write_lines(rejects, [json.dumps(r, ensure_ascii=False) for r in rejected])
    return results


def json_lines(flag: str, file: Path, need: tuple[str, ...], optional=()):
    """The objects of a JSON Lines file -> [("FLAG FILE:NUMBER", object)]. `need`: required keys;
    their values and those of `optional` are texts or null.
    """
    wanted = " and ".join(f"'{name}'" for name in need)
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {file}: no such file; expected JSON Lines with {wanted}")
    records = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        where = f"{flag} {file}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON ({error.msg}); expected one object a line"
            ) from None
        if not isinstance(record, dict) or not set(need) <= set(record):
            raise ValueError(
                f"{where}: expected an object with {wanted}, found {line.strip()[:80]}"
            )
        for name in (*need, *optional):
            if not isinstance(record.get(name), (str, type(None))):
                raise ValueError(f"{where}: '{name}' is {record[name]!r}; expected a text or null")
        records.append((where, record))
    return records


def import_texts(
    file: Path, places: list[tuple[int, str]], rows: list[dict], source: str, field: str
) -> tuple[dict, dict]:
    """Texts from a file: JSON Lines {source, field, "id" or "audio"} -> ({(row number, source
    text): [texts]}, counts).

    A record belongs to the `places` (row number, source text) that agree with what it gives of
    source text, id and audio file (name without folder and suffix). A record is skipped if its text
    is null, or if it is a negative equal to its caption.
    """
    stem, squeeze = lambda path: stem_of(Path(str(path)).name), lambda text: " ".join(text.split())
    owners, texts, unused, copies, empty = (
        collections.defaultdict(list),
        collections.defaultdict(list),
        0,
        0,
        0,
    )
    for place in dict.fromkeys(places):
        names = {
            source: squeeze(place[1]),
            "id": str(rows[place[0]].get("id")),
            "audio": stem(rows[place[0]]["audio"]),
        }
        for name in names.items():
            owners[name].append((place, names))
    records = json_lines(
        "--import", file, ("caption", "negative") if field == "negative" else (field,), (source,)
    )
    for where, record in records:
        given = {
            source: squeeze(record.get(source) or ""),
            "id": str(record.get("id") or ""),
            "audio": stem(record.get("audio") or ""),
        }
        given = {name: value for name, value in given.items() if value}
        if not given or (field == "negative" and "caption" not in given):
            raise ValueError(
                f"{where}: does not tell what it belongs to; expected '{source}'"
                + " or 'id' or 'audio'" * (field != "negative")
            )
        found = [
            place
            for place, names in owners.get(next(iter(given.items())), [])
            if given.items() <= names.items()
        ]
        text = record[field]
        unused += not found
        if not text or not re.search(r"\w", text):
            empty += bool(found)
        elif field == "negative" and same_text(
            record["caption"], text
        ):  # a description may be a good caption as it is
            copies += bool(found)
        else:
            for place in found:
                texts[place].append(squeeze(text))
    counts = {
        "records": len(records),
        "matched": len(records) - unused,
        "unused": unused,
        "copies": copies,
        "empty": empty,
    }
    print(
        f"--import {file}: {len(records):,} records, {len(records) - unused:,} matched a {source} "
        f"({copies:,} copies of it and {empty:,} null "
        f"or empty left out), {unused:,} not used"
    )
    return texts, counts


def told(counts: dict) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "0"


def distinct(texts) -> list[str]:
    """The texts in order, without None and duplicates."""
    return list(dict.fromkeys(text for text in texts if text))


def check_counts(args) -> None:
    """Raise ValueError for a number out of range; --versions and --temperature where the command
    has them.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected 1 or more")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    versions, temperature = getattr(args, "versions", 1), getattr(args, "temperature", 0.0)
    if versions < 1 or not 0 <= temperature < math.inf or (versions > 1 and not temperature):
        raise ValueError(
            f"--versions {versions}, --temperature {temperature:g}: expected 1 or more, and a "
            "temperature above 0 for several "
            "versions, which would otherwise be equal"
        )


def say_unreadable(errors: list[str]) -> None:
    if errors:
        print(f"left out, unreadable: {len(errors):,}, such as {errors[0]}")


def of_length(rows: list[dict], min_s: float, max_s: float, workers: int):
    """-> rows of min_s to max_s seconds, {reason: number left out}. A row without a duration gets
    the one in its file header.
    """
    if not 0 <= min_s < max_s:
        raise ValueError(
            f"--min-s {min_s:g}, --max-s {max_s:g}: expected seconds, the first below the second"
        )
    unknown = [row for row in rows if not row.get("duration")]
    unreadable = with_durations(unknown, workers)[1] if unknown else []
    say_unreadable(unreadable)
    kept = [row for row in rows if min_s <= (row.get("duration") or -1) <= max_s]
    return kept, collections.Counter(
        {
            "unreadable": len(unreadable),
            f"not of {min_s:g} to {max_s:g} s": len(rows) - len(kept) - len(unreadable),
        }
    )


def finished(rows: list[dict], key: str, source: str, report: dict):
    """Print a summary -> rows that have a text, (row's `source`, text) pairs, report."""
    kept = [row for row in rows if row.get(key) or row.get("captions")]
    report["left_out"]["without an accepted answer"] = len(rows) - len(kept)
    pairs = [(row[source], text) for row in kept for text in row.get(key, [])]
    print(
        f"{len(kept):,} clips with {len(pairs):,} texts under '{key}'; left out: "
        f"{told(report['left_out'])}"
    )
    if not pairs:
        raise ValueError(
            "not one answer was accepted, nothing is written (left out: "
            f"{told(report['left_out'])})"
        )
    return (
        kept,
        pairs,
        report | {"clips": len(kept), key: len(pairs), "left_out": dict(report["left_out"])},
    )


def fill_negatives(rows: list[dict], out: Path, args):
    """Task negatives, by rules, a language model or a file -> rows, (caption, negative) pairs,
    report.
    """
    for row in rows:
        old = row.get("negatives", [])
        if row.get("captions"):
            row["negatives"] = (
                [None] * len(row["captions"]) if args.overwrite_negatives or not old else list(old)
            )
    todo = [
        (n, k, caption)
        for n, row in enumerate(rows)
        for k, caption in enumerate(row.get("captions", []))
        if row["negatives"][k] is None
    ]
    captions, total = (
        [caption for *_, caption in todo],
        sum(len(row.get("captions", [])) for row in rows),
    )
    if not total:
        raise ValueError(
            f"--data {args.data}: not one of its {len(rows):,} clips has 'captions', which --task "
            "negatives rewrites"
        )
    print(
        f"{args.data}: {len(rows):,} clips, {total:,} captions, {total - len(todo):,} negatives "
        "kept"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    report, how = {"captions": total}, collections.Counter()
    if args.llm:
        answers = ask_llm(captions, NEGATIVES_PROMPT, args, out.with_suffix(".llm.jsonl"))
        made = checked_answers(
            [(caption, answers[caption, 0]) for caption in captions],
            check_order,
            out.with_suffix(".rejected.jsonl"),
        )
        texts = [made[caption, answers[caption, 0]] for caption in captions]
    elif args.import_file:
        made, report["import"] = import_texts(
            Path(args.import_file),
            [(n, caption) for n, row in enumerate(rows) for caption in row.get("captions", [])],
            rows,
            "caption",
            "negative",
        )
        texts = [made[n, caption][-1] if (n, caption) in made else None for n, _, caption in todo]
    else:
        made = {
            caption: reverse_order(caption)
            for caption in tqdm(dict.fromkeys(captions), desc="captions", leave=False)
        }
        texts = [made[caption][0] for caption in captions]
        how.update(("made: " if made[c][0] else "none: ") + made[c][1] for c in captions)
    for (n, k, _), text in zip(todo, texts):
        rows[n]["negatives"][k] = text

    pairs = [
        (caption, text)
        for row in rows
        for caption, text in zip(row.get("captions", []), row.get("negatives", []))
        if text
    ]
    report |= {"negatives": len(pairs), "splits": {}, "how": dict(how)}
    for split in sorted({row.get("split", "none") for row in rows}):
        members = [row for row in rows if row.get("split", "none") == split and row.get("captions")]
        counts = [
            sum(text is not None for row in members for text in row["negatives"]),
            sum(len(row["captions"]) for row in members),
        ]
        report["splits"][split] = dict(zip(("negatives", "captions"), counts))
        print(
            f"{split}: {counts[0]:,} of {counts[1]:,} captions have a negative "
            f"({counts[0] / max(1, counts[1]):.1%})"
        )
    for name, count in how.most_common():
        print(f"  {name} {count:,}")
    print(f"without a negative: {total - len(pairs):,} captions")
    return rows, pairs, report


# ---- cleaned captions ----

CLEAN_PROMPT = """The uploader of a recording describes it. Write what is heard in it as one \
caption: one plain English sentence. Keep only sounds that the description or its tags tell of; \
leave out names, places, dates, equipment, files, addresses and remarks. \
If no sound is told of, answer NONE. Answer with one line.

"""
CLEAN_EXAMPLES = [  # ours: the ten of Cacophony are not published
    (
        "dog_bark_02.wav. My neighbour's dog barking at the postman, recorded with a Zoom H4n from "
        "the kitchen window (tags: dog, bark)",
        "A dog is barking",
    ),
    (
        "Rain on tent. Heavy rain falling on my tent at the campsite near Lake Garda, 12/08/2011. "
        "Some thunder far away. Enjoy!",
        "Heavy rain falls on a tent with thunder far away",
    ),
    (
        "Door Slam 3. wooden door slammed shut, 24bit/96kHz, Rode NT1-A. Please credit me if you "
        "use it!",
        "A wooden door slams shut",
    ),
    (
        "Tram line 4. Tram arriving at the stop, doors opening, then it pulls away again. Recorded "
        "in Zagreb, spring 2009",
        "A tram arrives at a stop, its doors open, and it pulls away",
    ),
    (
        "kettle. Water boiling in an old kettle until it starts to whistle. more of my sounds on "
        "www.kettles.example",
        "Water boils in a kettle until it whistles",
    ),
    (
        "Market ambience. Stereo recording of a busy market: people talking, vendors shouting, a "
        "child laughing. iPhone, so sorry for the quality",
        "People talk and vendors shout at a busy market while a child laughs",
    ),
    ("BD_808_hit (tags: drum, kick, one-shot)", "A single hit of a kick drum"),
    (
        "typing. Me writing my thesis on a mechanical keyboard at 3 a.m., the chair squeaks near "
        "the end. For a film project by M. Weber",
        "Someone types on a mechanical keyboard and then a chair squeaks",
    ),
    (
        "church bells sunday. bells of the village church from about 200 m, with swallows and a "
        "car passing by :) contact: bells@mail.example",
        "Church bells ring at a distance while birds chirp and a car passes by",
    ),
    ("untitled 17. Test upload, please ignore. Levels are too low, will be replaced soon", "NONE"),
]
MOST_WORDS = 40  # of a caption; a description is cut after 150, the rest is about its uploader
LEFT_OVER = {
    name: re.compile(pattern, re.I)
    for name, pattern in {  # none of these belongs in a caption
        "refusal": r"\bI(?: a|['’])m (?:sorry|unable)|\bI can(?:no|['’])t\b|\bas an "
        r"AI\b|\blanguage model\b",
        "preamble": r"^here(?: is|['’]s)\b.*:",
        "address": r"https?:|www\.|\S@\S|\w\.(?:com|org|net)\b",
        "file name": r"\w\.(?:wav|aiff?|flac|ogg|mp3|m4a)\b|\w_\w",
        "date": r"\b\d{1,4}[./-]\d{1,2}[./-]\d{2,4}\b|\b(?:19|20)\d\d\b",
        "recording gear": r"\brecorded (?:with|on|using|by|via|through|at|in)\b|\bzoom "
        r"h\d|\bh[1-6]n\b|\br[oø]de nt|\b(?:16|24|32)[ -]?bits?\b|"
        r"\b(?:44|48|96|192)[.,\d]* "
        r"?khz\b|\b(?:tascam|sennheiser|neumann|marantz|edirol|audacity|iphone|shure|olympus)\b",
    }.items()
}


def described(row: dict) -> str:
    """Input of --task clean: the `description`, cut after 150 words, and the labels as tags."""
    tags = ", ".join(row.get("labels", [])).replace("_", " ")
    return " ".join(row["description"].split()[:150]) + f" (tags: {tags})" * bool(tags)


DESCRIBING_WORDS = set(
    """
    a an the of in on at by with from to and or for into over through his her its their some two
    three four five six several many few multiple various numerous loud soft light low high pitched
    long short quick brief electronic digital metallic small large big heavy sharp faint distant
    repeated repetitive rapid repeating hard single constant continuous gentle muffled fast slow
    deep strange odd weird distinct different audible quiet high-pitched
    """.split()
)


def check_caption(description: str, answer: str) -> tuple[str | None, str | None]:
    """A cleaned caption -> (caption or None, reason for rejection or None).

    A caption is one line and one sentence of at most MOST_WORDS words. No pattern of LEFT_OVER
    matches it. It shares a `content` word with the description or its tags; one that shares none is
    invented (or a translation, which is lost).
    """
    answer = bare(answer)

    def words(text):
        return set(
            content(
                [w for w in re.findall(r"[^\W\d_]+", text.lower()) if w not in DESCRIBING_WORDS]
            )
        )

    if not re.search(r"\w", answer):
        return None, "empty"
    if re.match(NONE, answer, re.I):
        return None, "NONE: no sound is told of"
    for reason, pattern in LEFT_OVER.items():
        if pattern.search(answer):
            return None, reason
    if "\n" in answer or re.search(r"[.!?]\s+[^\W\d_]", answer):
        return None, "more than one sentence"
    if len(answer.split()) > MOST_WORDS:
        return None, f"more than {MOST_WORDS} words"
    if not words(answer) & words(description):
        return None, "no word of the description"
    return answer, None


def clean_prompt(file: str | None) -> str:
    """CLEAN_PROMPT with the examples of --examples, JSON Lines {"description", "caption"}, or with
    our own.
    """
    examples = CLEAN_EXAMPLES
    if file:
        examples = []
        for where, record in json_lines("--examples", Path(file), ("description", "caption")):
            examples.append(
                tuple(" ".join((record[name] or "").split()) for name in ("description", "caption"))
            )
            if not all(examples[-1]) or "{caption}" in "".join(examples[-1]):
                raise ValueError(
                    f"{where}: expected two texts that are not empty and do not hold the word "
                    "{caption}"
                )
        if not examples:
            raise ValueError(
                f"--examples {file}: no example there; expected JSON Lines with 'description' and "
                "'caption'"
            )
    return (
        CLEAN_PROMPT
        + "".join(f"Description: {text}\nCaption: {caption}\n\n" for text, caption in examples)
        + "Description: {caption}\nCaption:"
    )


def clean(rows: list[dict], out: Path, args):
    """Task clean (as Cacophony cleans Freesound): noisy descriptions -> rows with captions,
    (description, caption) pairs, report.

    A description is not a caption, so `captions` holds the cleaned ones only; the original text
    stays as `description`. `negatives` belong to the old texts and are removed.
    """
    if not (args.llm or args.import_file):
        raise ValueError("--task clean: no rules can do this; give --llm HF_ID or --import FILE")
    prompt = clean_prompt(args.examples)
    rows, left_out = of_length(rows, args.min_s, args.max_s, os.cpu_count())
    for row in rows:
        row["description"] = row.get("description") or ". ".join(row.pop("captions", []))
        row.pop("negatives", None)
    left_out["without a description"] = sum(not row["description"].strip() for row in rows)
    rows = [row for row in rows if row["description"].strip()]
    if not rows:
        raise ValueError(
            f"--data {args.data}: no clip is left ({told(left_out)}); a description is the key "
            "'description' or the captions"
        )
    print(f"{args.data}: {len(rows):,} descriptions; left out: {told(left_out)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts, report = [described(row) for row in rows], {}
    if args.llm:
        temperature = args.temperature if args.versions > 1 else 0.0
        answers = ask_llm(
            texts,
            prompt,
            args,
            out.with_suffix(".llm.jsonl"),
            "description",
            args.versions,
            temperature,
        )
        answers = [[answers[text, version] for version in range(args.versions)] for text in texts]
    else:
        places = [(n, row["description"]) for n, row in enumerate(rows)]
        found, report["import"] = import_texts(
            Path(args.import_file), places, rows, "description", "caption"
        )
        answers = [found.get(place, []) for place in places]
    pairs = [(text, answer) for text, several in zip(texts, answers) for answer in several]
    made = checked_answers(pairs, check_caption, out.with_suffix(".rejected.jsonl"), "description")
    for row, text, several in zip(rows, texts, answers):
        row["captions"] = distinct(made[text, answer] for answer in several)
    return finished(rows, "captions", "description", report | {"left_out": left_out})


TASK_FLAGS = {
    "negatives": {"overwrite_negatives": False},  # defaults of the flags that only this task has
    "clean": {"examples": None, "versions": 5, "temperature": 0.7, "min_s": 1.0, "max_s": 300.0},
}


def open_rows(args):
    """Check the flags and the output before hours of work -> rows of --data, class list or None,
    manifest to write.
    """
    source, out = common.manifest_path(args.data), Path(args.out)
    out = out if out.suffix == ".jsonl" else out / "manifest.jsonl"
    check_output(out)
    check_counts(args)
    classes = source.parent / "classes.txt"
    keep = classes.is_file() and not (out.parent / "classes.txt").exists()
    return (
        common.read_manifest([str(source)]),
        read_text(classes).splitlines() if keep else None,
        out,
    )


def write_rows(out: Path, rows: list[dict], classes, pairs, args) -> None:
    """Print some random pairs and write the manifest."""
    for i in np.random.default_rng(args.seed).permutation(len(pairs))[: args.show]:
        print(f"  {pairs[i][0]}\n    -> {pairs[i][1]}")
    write_manifest(out, rows, classes)


def rewrite(args) -> dict:
    """Write a manifest with texts made by rules, by a language model or from a file."""
    for flag in (
        flag
        for task, flags in TASK_FLAGS.items()
        if task != args.task
        for flag in flags
        if flag in vars(args)
    ):
        raise ValueError(f"--{flag.replace('_', '-')}: --task {args.task} has no such flag")
    args = argparse.Namespace(**{**TASK_FLAGS[args.task], **vars(args)})
    rows, classes, out = open_rows(args)
    rows, pairs, report = (clean if args.task == "clean" else fill_negatives)(rows, out, args)
    write_rows(out, rows, classes, pairs, args)
    return {"manifest": str(out), **report}


# ------------------------------------------------------------------------------------------------
# Captions by a captioner trained here
# ------------------------------------------------------------------------------------------------


def recaption(args) -> dict:
    """Write a manifest with `synthetic` captions by a model trained here; `captions` stay.

    The model's `caption` gets the whole clip, and itself handles one longer than its window. What
    it draws depends on the batch, so a call that continues another draws otherwise.
    """
    rows, classes, out = open_rows(args)
    device = common.start_device(args.device)
    model = evaluation.load_model(args.model).to(device)
    if not hasattr(model, "caption"):
        raise ValueError(
            f"--model {args.model}: a model of {type(model).__module__}.py, which writes no "
            "captions; give a checkpoint of a "
            "script whose Model has caption()"
        )
    rows, left_out = of_length(rows, args.min_s, args.max_s, os.cpu_count())
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = out.with_suffix(".captions.jsonl")
    key = {
        "model": file_hash(args.model) if os.path.isfile(args.model) else args.model,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    answers, versions = stored_answers(cache, key, "audio"), range(args.versions)
    files = {common.file_key(row): row for row in rows}  # each file is captioned once
    todo = [name for name in files if not all((name, version) in answers for version in versions)]
    print(f"{cache}: {len(files) - len(todo):,} of {len(files):,} files captioned before")
    loader = common.file_batches(
        model, [files[name] for name in todo], args.batch_size, args.workers
    )
    unreadable = []
    with (
        open(cache, "a", encoding="utf-8") as file,
        tqdm(total=len(todo), desc="captions", unit="clip") as bar,
        torch.inference_mode(),
    ):
        for indices, waveform, n_samples, errors in loader:  # waveform (B, S)
            names = [todo[i] for i in indices]
            made = {}
            for version in versions if names else ():
                seed = draw_seed(
                    args.seed, version, [os.path.basename(files[name]["audio"]) for name in names]
                )
                texts = model.caption(
                    waveform.to(device), n_samples, temperature=args.temperature, seed=seed
                )
                made |= {(name, version): text for name, text in zip(names, texts)}
            store_answers(file, key, "audio", made)
            answers |= made
            unreadable += [text for _, text in errors]
            bar.update(len(names) + len(errors))
    say_unreadable(unreadable)
    heard = [row for row in rows if (common.file_key(row), 0) in answers]
    left_out["unreadable"] += len(rows) - len(heard)
    said = [
        [(row["audio"], answers[common.file_key(row), version]) for version in versions]
        for row in heard
    ]

    def spoken(_, text):
        return (" ".join(text.split()), None) if re.search(r"\w", text) else (None, "empty")

    made = checked_answers(
        itertools.chain(*said), spoken, out.with_suffix(".rejected.jsonl"), "audio"
    )
    for row, pairs in zip(heard, said):
        row["synthetic"] = distinct(made[pair] for pair in pairs)
    heard, pairs, report = finished(heard, "synthetic", "audio", {"left_out": left_out})
    write_rows(out, heard, classes, pairs, args)
    return {"manifest": str(out), **report}


# ------------------------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.captions", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = functools.partial(
        commands.add_parser,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p = add(
        "rewrite",
        help="make texts from a manifest's texts: captions in another order, captions from noisy "
        "descriptions",
    )
    p.add_argument(
        "--task",
        required=True,
        choices=list(TASK_FLAGS),
        help="negatives: for each caption the same events in another order in time, "
        "or null if it states no order; existing negatives are kept. clean: captions of "
        "the sounds, made from the key "
        "description, else from the captions (title, description), which stay as description; "
        "labels are used as tags",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="MANIFEST",
        help="a manifest, a folder that holds one, or the word demo",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="MANIFEST_OR_FOLDER",
        help="NAME.jsonl, or a folder for manifest.jsonl; classes.txt is copied beside it",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--llm",
        metavar="HF_ID",
        help="ask this language model, a hub id or a folder; its answers are kept in "
        "NAME.llm.jsonl beside the output, from which a killed run continues; rejected answers are "
        "listed in NAME.rejected.jsonl",
    )
    how.add_argument(
        "--import",
        dest="import_file",
        metavar="FILE",
        help="take the texts from JSON Lines: {caption, negative, optionally id or audio}; "
        "clean: {caption, and "
        "description, id or audio}, one line per version",
    )
    of_task = {"default": argparse.SUPPRESS}
    p.add_argument(
        "--overwrite-negatives",
        action="store_true",
        **of_task,
        help="negatives: replace existing negatives; without this flag they stay "
        "and only gaps are filled",
    )
    p.add_argument(
        "--examples",
        metavar="FILE",
        **of_task,
        help="clean: examples for the prompt, JSON Lines {description, caption} [ten of our own]",
    )
    p.add_argument(
        "--versions",
        type=int,
        **of_task,
        help="clean: captions per clip, duplicates removed [5, the paper's]",
    )
    p.add_argument(
        "--temperature",
        type=float,
        **of_task,
        help="clean: sampling temperature for several versions; a single one is greedy [0.7]",
    )
    p.add_argument(
        "--min-s",
        type=float,
        **of_task,
        help="clean: leave out shorter clips, seconds [1, the paper's]",
    )
    p.add_argument(
        "--max-s",
        type=float,
        **of_task,
        help="clean: leave out longer clips, seconds [300, the paper's]",
    )
    p.add_argument(
        "--batch-size", type=int, default=32, help="prompts the language model answers at a time"
    )
    p.add_argument("--device", default="auto", help="for the language model: auto, cpu or cuda")
    p.add_argument("--show", type=int, default=5, help="random pairs to print")
    p.add_argument("--seed", type=int, default=0, help="seeds the draws and the pairs to print")
    p.set_defaults(run=rewrite)
    p = add(
        "recaption",
        help="caption a manifest's clips with a captioner trained here, as synthetic captions",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="MANIFEST",
        help="a manifest, a folder that holds one, or the word demo",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="CKPT",
        help="a checkpoint of a script whose Model has caption()",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="MANIFEST_OR_FOLDER",
        help="NAME.jsonl, or a folder for manifest.jsonl, with the key synthetic in "
        "each row, and its captions if it has any; classes.txt is copied beside it; the "
        "answers are kept in NAME.captions.jsonl, from "
        "which a killed run continues; rejected ones are listed in NAME.rejected.jsonl",
    )
    p.add_argument(
        "--versions", type=int, default=1, help="captions drawn per clip, duplicates removed"
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=0.1,
        help="sampling temperature; 0: greedy (0.1 is the paper's for its own captions)",
    )
    p.add_argument(
        "--min-s",
        type=float,
        default=1.0,
        help="leave out shorter clips, seconds (the paper's limit for Freesound)",
    )
    p.add_argument(
        "--max-s",
        type=float,
        default=300.0,
        help="leave out longer clips, seconds (the paper's limit for Freesound)",
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="clips at a time, fewer where they are longer than 30 s",
    )
    p.add_argument("--workers", type=int, default=4, help="processes that read audio")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--show", type=int, default=5, help="random captions to print")
    p.add_argument("--seed", type=int, default=0, help="seeds the draws and the captions to print")
    p.set_defaults(run=recaption)
    return parser.parse_args(argv)


def main(args) -> dict:
    return args.run(args)


if __name__ == "__main__":
    common.run_entry(main, parse)

"""A child that follows the protocol, or fails in one way: a script whose argument names the way.

The ways: answers, hangs, dies, dies-at-once, rubbish, too-few, wrong-ids, lies (about its time), unsupported,
refused, hungry (allocates 400 MiB), other-tokens, mute-score. It uses the standard library only.
"""

from __future__ import annotations

import json
import sys
import time


def main(way: str) -> None:
    """Serve until the input ends."""
    if way == "dies-at-once":
        print("no such model", file=sys.stderr)
        sys.exit(7)
    for line in sys.stdin:
        request = json.loads(line)
        what = request["do"]
        answer: dict[str, object] = {"id": request["id"], "ok": True}
        if what == "hello":
            answer["versions"] = {"fake": "1"}
        elif what == "load" and way in ("unsupported", "refused"):
            answer = {"id": request["id"], "ok": False, "reason": way, "error": f"it is {way}\nindeed"}
        elif what == "load" and way == "hungry":
            taken = bytearray(400 << 20)
            answer["loaded"] = {"bytes": len(taken)}
        elif what == "generate":
            answer |= generate(way, request)
        elif what == "score":
            if way == "mute-score":
                answer = {"id": request["id"], "ok": False, "reason": "unsupported", "error": "no scores"}
            else:
                answer["logprobs"] = [[-0.5] * (len(ids) - 1) for ids in request["sequences"]]
        print("what is this" if way == "rubbish" and what == "generate" else json.dumps(answer), flush=True)
        if what == "end":
            return


def generate(way: str, request: dict[str, object]) -> dict[str, object]:
    """Count on from each prompt's last id, modulo 50; report 0.01 s for prefill and 0.01 s for decode."""
    if way == "hangs":
        time.sleep(60)
    if way == "dies":
        print("something broke", file=sys.stderr)
        sys.exit(3)
    prompts, new = request["prompts"], request["new_tokens"]
    assert isinstance(prompts, list) and isinstance(new, int)
    step = 2 if way == "other-tokens" else 1
    tokens = [[(ids[-1] + step * (i + 1)) % 50 for i in range(new)] for ids in prompts]
    if way == "too-few":
        tokens = [row[:-1] for row in tokens]
    if way == "wrong-ids":
        tokens = [[1 << 20 for _ in row] for row in tokens]
    seconds = 100.0 if way == "lies" else 0.01
    time.sleep(0.02)
    return {"tokens": tokens, "prefill_s": seconds, "decode_s": 0.01, "anonymous_bytes": 1 << 20}


if __name__ == "__main__":
    main(sys.argv[1])

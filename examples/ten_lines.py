"""Generate and score with an offloading policy: ``PYTHONPATH=. python examples/ten_lines.py``."""

from math import exp

from engine import Engine, Policy
from harness.tokenizer import Text

MODEL = "scenarios/demo/model"
SHOTS = """Fill in the form from the request: name, date, item, amount.

Request: The desk is for Paul Weber, 6 pieces, due on 5 April. Charge it to sales.
Form: Paul Weber | 5 April | desk | 6

Request: Please send 3 of the monitor to Clara Diaz by 1 December. Charge it to legal.
Form:"""

text = Text.load(MODEL)
prompt = text.start_ids + text.encode(SHOTS)
forms = (" Clara Diaz | 1 December | monitor | 3", " Paul Weber | 5 April | desk | 6")
answers = [text.encode(form) for form in forms]
with Engine(MODEL, Policy.parse("weights=0/0.5/0.5,kv=host,kv_quant=4")) as engine:
    (output,) = engine.generate([prompt], max_new_tokens=24, stop_token_ids=text.encode("\n"))
    logprobs = engine.score([prompt + answer for answer in answers])
print("generated:", text.join(output.tokens).decode().strip())
for form, answer, scored in zip(forms, answers, logprobs, strict=True):
    print(f"probability {exp(sum(scored[-len(answer) :])):.2f} of{form}")

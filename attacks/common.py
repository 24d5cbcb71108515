"""What the attacks by processes have in common."""
import json, os, struct


def profile(name, scale):
    shape = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8}
    sums = b"".join(struct.pack("<d", scale * (i % 7)) for i in range(2 * 2 * 64))
    header = {
        "__metadata__": {
            "format": "moa-profile-1",
            "model": json.dumps(shape),
            "info": json.dumps({"objective": "", "data": ""}),
            "lengths": json.dumps({"256": {"block": 32, "samples": 1}}),
        },
        "influence.256": {"dtype": "F64", "shape": [2, 2, 8, 8], "data_offsets": [0, len(sums)]},
    }
    text = json.dumps(header).encode()
    with open(name, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + sums)


def plans(folder):
    """What tells the plans of two profiles apart."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.startswith("plan-"):
            with open(os.path.join(folder, name)) as file:
                found.append(json.load(file)["provenance"]["predicted_losses"])
    return found


def cases(count):
    with open("cases.jsonl", "w") as file:
        for case in range(count):
            record = "\n".join(f"line {name}-{case}: REGISTER_CONTENT is <{i * 37 + case}>" for i, name in enumerate(["amber", "cedar", "delta"]))
            prompt = f"Below is a record of lines.\n\n{record}\nTell me what is the <REGISTER_CONTENT> in line cedar-{case}?"
            file.write(json.dumps({"prompt": prompt, "expected_number": 37 + case, "correct_line": f"line cedar-{case}: REGISTER_CONTENT is <{37 + case}>\n"}) + "\n")

"""The openai package, and LangChain where it is installed, against `moa serve`: clients.py URL [MODEL] [grammar]."""
import json
import sys
from typing import Literal

import openai

url, model = sys.argv[1], (sys.argv[2:] or ["moa-tiny"])[0]
has_grammar = "grammar" in sys.argv
client = openai.OpenAI(base_url=url, api_key="key", max_retries=0)
hello = [{"role": "user", "content": "Hello! Who are you?"}]

assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(model=model, messages=hello, max_tokens=12, temperature=0)
assert whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("length", "stop")
stream = client.chat.completions.create(
    model=model, messages=hello, max_tokens=12, temperature=0, stream=True,
    stream_options={"include_usage": True})
chunks = list(stream)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content, (text, whole)
assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens

many = client.chat.completions.create(
    model=model, messages=hello, max_completion_tokens=8, n=3, seed=7, temperature=1.0, top_p=0.9,
    presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"5": -100}, stop=["\n\n"],
    logprobs=True, top_logprobs=4)
assert [c.index for c in many.choices] == [0, 1, 2]
entry = many.choices[1].logprobs.content[0]
assert len(entry.top_logprobs) == 4 and entry.logprob <= 0 and bytes(entry.bytes or []).decode() is not None

done = client.completions.create(model=model, prompt=["Once upon a time", "The ship"], max_tokens=6, logprobs=2)
assert len(done.choices) == 2 and len(done.choices[0].logprobs.tokens) == 6
pieces = client.completions.create(model=model, prompt="Once upon a time", max_tokens=6, stream=True)
assert "".join(p.choices[0].text for p in pieces) == done.choices[0].text

likely = client.completions.create(model=model, prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1)
assert likely.choices[0].logprobs.token_logprobs[0] is None and likely.choices[0].logprobs.token_logprobs[-1] < 0

for body, kind in [({"temperature": -1}, openai.BadRequestError), ({"model": "gpt-4"}, openai.NotFoundError)]:
    try:
        client.chat.completions.create(**{"model": model, "messages": hello, **body})
        raise SystemExit(f"{body} was taken")
    except kind as error:
        assert error.body["param"] == next(iter(body)), error.body
try:
    openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    raise SystemExit("a wrong key was taken")
except openai.AuthenticationError:
    pass

weather = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}
asked = [{"role": "user", "content": "What is the weather in Paris?"}]
auto = client.chat.completions.create(model=model, messages=asked, tools=[weather], max_tokens=8)
assert auto.choices[0].finish_reason
schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": weather["function"]["parameters"]}}
if has_grammar:
    called = client.chat.completions.create(
        model=model, messages=asked, tools=[weather], tool_choice="required", max_tokens=100)
    call = called.choices[0].message.tool_calls[0].function
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome"), called
    chosen = client.chat.completions.create(
        model=model, messages=asked, max_tokens=100, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.choices[0].message.content.strip() in ("yes", "no"), chosen
    for stream in (False, True):
        told = client.chat.completions.create(
            model=model, messages=asked, response_format=schema, max_tokens=100, stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in told) if stream else told.choices[0].message.content
        assert json.loads(text)["city"] in ("Paris", "Rome"), text
else:
    try:
        client.chat.completions.create(model=model, messages=asked, response_format=schema, max_tokens=8)
    except openai.BadRequestError as error:
        assert "grammar" in str(error)

# The same by responses. Their types are checked here, which the client does not do.
def checked(raw):
    return openai.types.responses.Response.model_validate_json(raw, strict=True)

asked_of = {"model": model, "input": hello[0]["content"], "max_output_tokens": 12, "temperature": 0}
response = checked(client.responses.with_raw_response.create(**asked_of, metadata={"a": "b"}).text)
assert response.output_text == whole.choices[0].message.content, response
assert response.usage.total_tokens == whole.usage.total_tokens and response.metadata == {"a": "b"}
assert response.status == ("incomplete" if whole.choices[0].finish_reason == "length" else "completed")
events = list(client.responses.create(**asked_of, stream=True))
assert [e.sequence_number for e in events] == list(range(len(events)))
assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == response.output_text
checked(events[-1].response.to_json())
assert events[-1].response.output_text == response.output_text
with client.responses.stream(**asked_of) as stream:
    assert [e.snapshot for e in stream if e.type == "response.output_text.delta"][-1] == response.output_text
told = client.responses.create(**asked_of, include=["message.output_text.logprobs"], top_logprobs=2)
assert len(told.output[0].content[0].logprobs[0].top_logprobs) == 2
# What was said goes back as it came, with what is asked next.
more = client.responses.create(
    model=model, instructions="Be brief.", max_output_tokens=8, store=False,
    input=[hello[0], *response.output, {"role": "user", "content": "And then?"}])
assert more.usage.input_tokens > response.usage.input_tokens and more.output[0].type == "message"
for body in [{"previous_response_id": "resp_1"}, {"background": True}, {"truncation": "auto"}]:
    try:
        client.responses.create(model=model, input="Hi", **body)
        raise SystemExit(f"{body} was taken")
    except openai.BadRequestError as error:
        assert error.body["param"] == next(iter(body)), error.body
tool = {"type": "function", "strict": True, **weather["function"]}
if has_grammar:
    required = {"model": model, "input": asked, "tools": [tool], "tool_choice": "required", "max_output_tokens": 100}
    response = checked(client.responses.with_raw_response.create(**required).text)
    [call] = response.output
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome"), response
    *_, last = client.responses.create(**required, stream=True)
    assert last.type == "response.completed" and last.response.output[0].type == "function_call", last
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    after = client.responses.create(
        model=model, input=[*asked, call, result], tools=[tool], tool_choice="none", max_output_tokens=8)
    assert after.output[0].type == "message", after

    import pydantic

    class Weather(pydantic.BaseModel):
        city: Literal["Paris", "Rome"]

    wanted = {"model": model, "input": asked, "text_format": Weather, "max_output_tokens": 100}
    assert isinstance(client.responses.parse(**wanted).output_parsed, Weather)
    with client.responses.stream(**wanted) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)
    call = client.responses.parse(
        model=model, input=asked, tools=[openai.pydantic_function_tool(Weather, name="weather")["function"] | {
            "type": "function"}], tool_choice="required", max_output_tokens=100).output[0]
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome"), call
print(f"openai {openai.__version__}: fine")

try:
    from langchain_openai import ChatOpenAI
except ImportError:
    print("LangChain is not installed")
else:
    chat = ChatOpenAI(base_url=url, api_key="key", model=model, max_tokens=8, temperature=0)
    said = chat.invoke("Hello!").content
    assert said == "".join(piece.content for piece in chat.stream("Hello!"))
    chat = ChatOpenAI(
        base_url=url, api_key="key", model=model, max_tokens=8, temperature=0, use_responses_api=True)
    assert said == chat.invoke("Hello!").text == "".join(piece.text for piece in chat.stream("Hello!"))
    print("LangChain: fine")

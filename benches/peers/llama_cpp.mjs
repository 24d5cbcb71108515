// llama.cpp on the same GGUF file, by the prebuilt binaries of the npm package node-llama-cpp:
//
//     npm install node-llama-cpp
//     node benches/peers/llama_cpp.mjs --model MODEL.gguf --prompts 512,2048 --new-tokens 64 --threads 2
//
// Options are those of `moa bench`, which is to be run before and after: ratios of one machine in one hour.
// Prefill is one call of all random tokens, decode greedy steps behind them; medians of `--repeats` runs. With
// `--text FILE` it prints the greedy answer to a prompt instead, and the prompt's tokens; with `--tokens 5,6,7` the
// probabilities of all tokens after each of those.
import { readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const options = { prompts: "512", "new-tokens": "64", threads: "2", repeats: "3", "flash-attention": "auto" };
for (let i = 2; i < process.argv.length; i += 2) options[process.argv[i].slice(2)] = process.argv[i + 1];
const [threads, steps, repeats] = ["threads", "new-tokens", "repeats"].map((name) => Number(options[name]));
const flashAttention = options["flash-attention"] === "auto" ? undefined : options["flash-attention"] === "on";

const llama = await getLlama({ gpu: false, build: "never", maxThreads: threads });
const model = await llama.loadModel({ modelPath: options.model });

async function open(size) {
    const context = await model.createContext({ contextSize: size + 8, batchSize: 512, threads, flashAttention });
    return { context, sequence: context.getSequence() };
}

if (options.tokens) {
    const tokens = options.tokens.split(",").map(Number);
    const { context, sequence } = await open(tokens.length);
    const ask = { generateNext: { probabilities: true, options: { temperature: 0 } } };
    const rows = await sequence.controlledEvaluate(tokens.map((token) => [token, ask]));
    console.log(JSON.stringify(rows.map((row) => Object.fromEntries(row.next.probabilities))));
    await context.dispose();
    process.exit(0);
}

if (options.text) {
    const tokens = model.tokenize(readFileSync(options.text, "utf8"), true);
    const { context, sequence } = await open(tokens.length + steps);
    const answer = [];
    for await (const token of sequence.evaluate(tokens, { temperature: 0 })) {
        if (model.isEogToken(token)) break;
        answer.push(token);
        if (answer.length === steps) break;
    }
    console.log(JSON.stringify({ tokens, answer, text: model.detokenize(answer) }));
    await context.dispose();
    process.exit(0);
}

const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
for (const prompt of options.prompts.split(",").map(Number)) {
    const [prefill, decode] = [[], []];
    for (let run = 0; run < repeats; run++) {
        const { context, sequence } = await open(prompt + steps);
        const tokens = Array.from({ length: prompt }, (_, i) => 100 + ((i * 7919 + run) % 40000));
        const begin = performance.now();
        await sequence.evaluateWithoutGeneratingNewTokens(tokens);
        prefill.push(performance.now() - begin);
        let [count, from] = [0, 0];
        for await (const _ of sequence.evaluate([100], { temperature: 0 })) {
            if (count === 0) from = performance.now();
            if (count++ === steps - 1) break;
        }
        decode.push((performance.now() - from) / (steps - 1));
        await context.dispose();
    }
    const [all, one] = [median(prefill), median(decode)];
    console.log(JSON.stringify({
        prompt, threads,
        prefill_tokens_per_second: Math.round((1e3 * prompt) / all),
        decode_tokens_per_second: Math.round(1e4 / one) / 10,
    }));
}
process.exit(0);

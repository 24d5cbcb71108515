// llama.cpp built for this machine, on the same GGUF file, from the source that llama-cpp-python packs:
//
//     cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_COMMON=OFF
//     cmake --build build --target llama
//     g++ -O2 -I include -I ggml/include llama_cpp.cpp -L build/bin -lllama -lggml -lggml-base -o llama_cpp
//     LD_LIBRARY_PATH=build/bin ./llama_cpp MODEL.gguf THREADS NEW_TOKENS REPEATS 512,2048
//     LD_LIBRARY_PATH=build/bin ./llama_cpp MODEL.gguf THREADS NEW_TOKENS "the text to go on with"
//     LD_LIBRARY_PATH=build/bin ./llama_cpp MODEL.gguf THREADS
//
// Flash attention and 16-bit caches. Prefill is all tokens in calls of 512, decode greedy steps behind them;
// medians of the repeats. With a text it prints the tokens and the greedy answer instead. With neither it does what
// turns.py asks: "prefill LENGTH - SEED" reads a prompt that it keeps, "decode LENGTH - STEPS" goes on with it; it prints
// the seconds of the prompt, or of one step.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "llama.h"

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static llama_token best(llama_context *context, int count) {
    const float *logits = llama_get_logits_ith(context, -1);
    return std::max_element(logits, logits + count) - logits;
}

static void feed(llama_context *context, llama_token *tokens, int count) {
    for (int at = 0; at < count; at += 512) {
        if (llama_decode(context, llama_batch_get_one(tokens + at, std::min(512, count - at)))) exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc != 3 && argc < 5) return 1;
    const int threads = atoi(argv[2]), steps = argc > 3 ? atoi(argv[3]) : 0;
    llama_log_set([](ggml_log_level level, const char *text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    const llama_vocab *vocab = llama_model_get_vocab(model);
    const int count = llama_vocab_n_tokens(vocab);
    auto open = [&](int size) {
        llama_context_params p = llama_context_default_params();
        p.n_ctx = size + 8;
        p.n_batch = p.n_ubatch = 512;
        p.n_threads = p.n_threads_batch = threads;
        p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        return llama_init_from_model(model, p);
    };
    if (argc == 3) {
        struct Kept { llama_context *context; llama_token token; };
        std::map<int, Kept> kept;
        char what[16], unused[16];
        for (int length, number; scanf("%15s %d %15s %d", what, &length, unused, &number) == 4; fflush(stdout)) {
            if (what[0] == 'p') {
                if (kept.count(length)) llama_free(kept[length].context);
                llama_context *context = open(length + 96);
                std::vector<llama_token> tokens(length);
                for (int i = 0; i < length; i++) tokens[i] = 100 + (i * 7919LL + number) % (count - 100);
                const double begin = now();
                feed(context, tokens.data(), length);
                kept[length] = {context, best(context, count)};
                printf("%f\n", now() - begin);
                continue;
            }
            Kept &own = kept[length];
            double begin = 0;
            for (int i = -2; i < number; i++) {
                if (i == 0) begin = now();
                feed(own.context, &own.token, 1);
                own.token = best(own.context, count);
            }
            printf("%f\n", (now() - begin) / number);
        }
        return 0;
    }
    if (argc == 5) {
        const std::string text = argv[4];
        std::vector<llama_token> tokens(text.size() + 8);
        tokens.resize(llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), true, true));
        printf("tokens");
        for (llama_token token : tokens) printf(" %d", token);
        llama_context *context = open(tokens.size() + steps);
        feed(context, tokens.data(), tokens.size());
        printf("\nanswer ");
        for (int i = 0; i < steps; i++) {
            llama_token token = best(context, count);
            if (llama_vocab_is_eog(vocab, token)) break;
            char piece[256];
            printf("%.*s", llama_token_to_piece(vocab, token, piece, sizeof piece, 0, true), piece);
            feed(context, &token, 1);
        }
        printf("\n");
        return 0;
    }
    const int repeats = atoi(argv[4]);
    for (char *next = argv[5]; *next; next += *next == ',') {
        const int prompt = strtol(next, &next, 10);
        std::vector<double> prefill, decode;
        for (int run = 0; run < repeats; run++) {
            llama_context *context = open(prompt + steps);
            std::vector<llama_token> tokens(prompt);
            for (int i = 0; i < prompt; i++) tokens[i] = 100 + (i * 7919LL + run) % (count - 100);
            double begin = now();
            feed(context, tokens.data(), prompt);
            llama_token token = best(context, count);
            prefill.push_back(now() - begin);
            begin = now();
            for (int i = 0; i < steps; i++) {
                feed(context, &token, 1);
                token = best(context, count);
            }
            decode.push_back((now() - begin) / steps);
            llama_free(context);
        }
        std::sort(prefill.begin(), prefill.end());
        std::sort(decode.begin(), decode.end());
        printf("{\"prompt\": %d, \"threads\": %d, \"prefill_tokens_per_second\": %.0f, \"decode_tokens_per_second\": %.1f}\n",
               prompt, threads, prompt / prefill[repeats / 2], 1 / decode[repeats / 2]);
        fflush(stdout);
    }
}

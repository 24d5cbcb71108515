//! Templates of models whose folders come without.

use super::ChatTemplate;

/// FastChat's `vicuna_v1.1`: a system line, then `USER: ... ASSISTANT: ...</s>`.
const VICUNA: &str = "\
{{ bos_token }}\
{% if messages and messages[0].role == 'system' %}\
{% set system = messages[0].content %}{% set messages = messages[1:] %}\
{% else %}\
{% set system = \"A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.\" %}\
{% endif %}\
{{ system + ' ' }}\
{% for message in messages %}\
{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}\
{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}\
{% else %}{{ raise_exception('no role ' + message.role + ' in a Vicuna chat') }}\
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

/// Llama 2 chat: `[INST] <<SYS>> ... <</SYS>> ... [/INST] ... </s>`.
const LLAMA2: &str = "\
{% set system = '' %}\
{% if messages and messages[0].role == 'system' %}\
{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}\
{% set messages = messages[1:] %}\
{% endif %}\
{% for message in messages %}\
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user, assistant, user, ...') }}\
{% elif message.role == 'user' %}\
{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}\
{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}\
{% endif %}\
{% endfor %}";

/// Llama 3 instruct, without the date lines of 3.1 and later.
const LLAMA3: &str = "\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}\
{{ message.content | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/// ChatML: `<|im_start|>role ... <|im_end|>`.
const CHATML: &str = "\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

impl ChatTemplate {
    /// The template of a name: `vicuna`, `llama2`, `llama3` or `chatml`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "vicuna" => Some(Self::vicuna()),
            "llama2" => Some(Self::llama2()),
            "llama3" => Some(Self::llama3()),
            "chatml" => Some(Self::chatml()),
            _ => None,
        }
    }

    /// The template of Vicuna v1.1 and v1.5, with FastChat's default system line.
    #[must_use]
    pub fn vicuna() -> Self {
        Self::new(VICUNA, "<s>", "</s>")
    }

    /// The template of Llama 2 chat.
    #[must_use]
    pub fn llama2() -> Self {
        Self::new(LLAMA2, "<s>", "</s>")
    }

    /// The template of Llama 3 instruct.
    #[must_use]
    pub fn llama3() -> Self {
        Self::new(LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    }

    /// ChatML, which Qwen, SmolLM and many others use, without a system message of its own.
    #[must_use]
    pub fn chatml() -> Self {
        Self::new(CHATML, "", "<|im_end|>")
    }
}

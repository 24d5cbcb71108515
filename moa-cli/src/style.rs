use moa_models::{ChatTemplate, Checkpoint, Math, PromptStyle};

use crate::error::{Error, Result};

/// How the texts of a run become prompts.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct StyleArgs {
    /// Chat template: vicuna, llama2, llama3, chatml, or a Jinja file [default: the model folder's]
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "raw")]
    pub(crate) template: Option<String>,
    /// No chat template: the model continues the text itself [default where the model has no template]
    #[arg(long)]
    pub(crate) raw: bool,
}

impl StyleArgs {
    /// Sets what the flags ask for.
    pub(crate) fn apply<D: Math>(&self, model: &mut Checkpoint<D>) -> Result<()> {
        if self.raw {
            model.set_prompt_style(PromptStyle::Raw);
        }
        let Some(template) = &self.template else { return Ok(()) };
        let template = match ChatTemplate::named(template) {
            Some(template) => template,
            None => ChatTemplate::from_file(template, &model.tokenizer).map_err(|error| {
                let names = "--template (vicuna, llama2, llama3, chatml or a file)";
                Error::from(error).at(names)
            })?,
        };
        model.set_template(template);
        Ok(())
    }
}

use std::path::PathBuf;

use moa_models::{Documents, Task, TaskSources};

use super::questions::file_fingerprint;
use crate::error::{Error, Result};

/// Files that generated questions are made from.
#[derive(Debug, clap::Args)]
pub(super) struct SourceArgs {
    /// Text that needles are hidden in where RULER takes essays [default: a built-in essay]
    #[arg(long, value_name = "FILE")]
    essay: Option<PathBuf>,
    /// Documents and questions of qa_1, in SQuAD's JSON format
    #[arg(long, value_name = "FILE.json")]
    squad: Option<PathBuf>,
    /// Documents and questions of qa_2, in HotpotQA's JSON format
    #[arg(long, value_name = "FILE.json")]
    hotpotqa: Option<PathBuf>,
}

impl SourceArgs {
    /// Reads the files.
    pub(super) fn load(&self) -> Result<TaskSources> {
        let read = |path: &PathBuf| {
            moa_core::read_text_file(path)
                .map_err(|source| Error::Read { path: path.clone(), source })
                .and_then(|text| match text.trim().is_empty() {
                    true => Err(Error::argument("--essay", "a file with words", "an empty one")),
                    false => Ok(text),
                })
        };
        let documents = |path: &Option<PathBuf>| path.as_ref().map(Documents::load).transpose();
        Ok(TaskSources {
            essay: self.essay.as_ref().map(read).transpose()?,
            squad: documents(&self.squad)?,
            hotpotqa: documents(&self.hotpotqa)?,
        })
    }

    /// The files.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.essay.iter().chain(&self.squad).chain(&self.hotpotqa)
    }

    /// Says which files they are, for the settings of an evaluation; nothing where there are none.
    pub(super) fn settings(&self) -> Result<Vec<(&'static str, String)>> {
        let files = [("essay", &self.essay), ("squad", &self.squad), ("hotpotqa", &self.hotpotqa)];
        let given = files.into_iter().filter_map(|(name, file)| Some((name, file.as_deref()?)));
        given.map(|(name, file)| Ok((name, file_fingerprint(file)?))).collect()
    }

    /// Checks that tasks have the files that they need.
    pub(super) fn check(&self, tasks: &[Task]) -> Result<()> {
        match tasks.iter().find(|task| !self.has(**task)) {
            None => Ok(()),
            Some(Task::Qa2) => Err(Error::argument(
                "--hotpotqa",
                "a file in HotpotQA's JSON format for qa_2",
                "none",
            )),
            Some(task) => {
                let expected = format!("a file in SQuAD's JSON format for {}", task.name());
                Err(Error::argument("--squad", expected, "none"))
            }
        }
    }

    /// Whether a task has the file that it needs.
    pub(super) fn has(&self, task: Task) -> bool {
        match task {
            Task::Qa1 => self.squad.is_some(),
            Task::Qa2 => self.hotpotqa.is_some(),
            _ => true,
        }
    }
}

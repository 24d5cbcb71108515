use std::collections::BTreeMap;

use moa_core::Profile;
use moa_models::{CalibrationData, CalibrationOptions, CalibrationPrompt, Checkpoint, Item, Math};

use crate::error::Result;
use crate::output::Context;
use crate::progress::Progress;

/// Reads what `--data` names.
pub(crate) fn load(data: &str) -> Result<CalibrationData> {
    Ok(match data {
        "records" => CalibrationData::Records,
        path => CalibrationData::Prompts(CalibrationPrompt::load(path)?),
    })
}

/// Makes calibration items under a progress bar.
pub(crate) fn items<D: Math>(
    model: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CalibrationOptions,
    context: &Context,
) -> Result<BTreeMap<usize, Vec<Item>>> {
    let total = options.lengths.len() * options.samples;
    let mut bar = Progress::new(context, "calibrate", total);
    Ok(model.calibrate(data, options, &mut bar)?)
}

/// What is wrong with the data of a profile, a sentence for each length; also told on stderr.
pub(crate) fn warnings(profile: &Profile, context: &Context) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for length in profile.lengths() {
        let far = profile.at(length)?.far_losses();
        if far.is_noise() {
            warnings.push(format!(
                "the calibration data ({}) has no long dependency at {length} tokens: without the far \
                 context its loss grows by {:.3} +- {:.3} nats per token in {} samples. A plan from it \
                 may keep the wrong heads; use prompts whose answers lie far back, or `--data records`",
                profile.info.data,
                far.mean(),
                far.standard_error(),
                far.samples(),
            ));
        }
    }
    for warning in &warnings {
        context.note(format_args!("warning: {warning}"));
    }
    Ok(warnings)
}

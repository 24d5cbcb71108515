use std::collections::BTreeMap;

use moa_models::{CalibrationData, CalibrationOptions, Item, Prompt};

use crate::error::Result;
use crate::model::Model;
use crate::output::Context;
use crate::progress::Progress;

/// Reads what `--data` names.
pub(crate) fn load(data: &str) -> Result<CalibrationData> {
    Ok(match data {
        "records" => CalibrationData::Records,
        path => CalibrationData::Prompts(Prompt::load(path)?),
    })
}

/// Makes calibration items under a progress bar.
pub(crate) fn items(
    model: &Model,
    data: &CalibrationData,
    options: &CalibrationOptions,
    context: &Context,
) -> Result<BTreeMap<usize, Vec<Item>>> {
    let total = options.lengths.len() * options.samples;
    let bar = Progress::new(context, "calibrate", total);
    Ok(model.calibrate(data, options, &mut || bar.step())?)
}

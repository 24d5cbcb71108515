/// Classification: 1 over the number of classes that the prediction names, if the right one is
/// among them. Classes whose names are part of the right one's do not count.
pub fn classification(prediction: &str, reference: &str, classes: &[impl AsRef<str>]) -> f64 {
    let named = classes
        .iter()
        .map(AsRef::as_ref)
        .filter(|class| prediction.contains(class))
        .filter(|class| *class == reference || !reference.contains(class));
    let (mut count, mut right) = (0, false);
    for class in named {
        count += 1;
        right |= class == reference;
    }
    if right { 1.0 / f64::from(count) } else { 0.0 }
}

/// Paragraph retrieval: share of the numbers in the prediction that are the one after "Paragraph " in
/// the reference.
pub fn paragraph(prediction: &str, reference: &str) -> f64 {
    after("Paragraph ", prediction, reference)
}

/// [`paragraph`] of Chinese texts, whose numbers come after "段落".
pub fn paragraph_zh(prediction: &str, reference: &str) -> f64 {
    after("段落", prediction, reference)
}

fn after(label: &str, prediction: &str, reference: &str) -> f64 {
    let right = reference
        .split(label)
        .skip(1)
        .find_map(|rest| numbers(rest).next().filter(|n| rest.starts_with(n)));
    right.map_or(0.0, |right| share(prediction, right))
}

/// Counting: share of the numbers in the prediction that are the reference.
pub fn count(prediction: &str, reference: &str) -> f64 {
    share(prediction, reference)
}

fn numbers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty())
}

fn share(prediction: &str, right: &str) -> f64 {
    let (mut all, mut same) = (0, 0);
    for number in numbers(prediction) {
        all += 1;
        same += u32::from(number == right);
    }
    f64::from(same) / f64::from(all.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_share_the_score() {
        let classes = ["Date", "Other number", "number", "Person"];
        assert_eq!(classification("Date", "Date", &classes), 1.0);
        assert_eq!(classification("Date or Person", "Person", &classes), 0.5);
        // "number" is part of "Other number": naming the longer one names both.
        assert_eq!(classification("Other number", "Other number", &classes), 1.0);
        assert_eq!(classification("Other number", "number", &classes), 0.5);
        assert_eq!(classification("Place", "Date", &classes), 0.0);
        assert_eq!(classification("Place", "Place", &classes), 0.0);
    }

    #[test]
    fn numbers_are_compared_as_written() {
        assert_eq!(paragraph("Paragraph 12", "Paragraph 12"), 1.0);
        assert_eq!(paragraph("It is 12, or 3 or 12.", "Paragraph 12"), 2.0 / 3.0);
        assert_eq!(paragraph("none", "Paragraph 12"), 0.0);
        assert_eq!(paragraph("12", "12"), 0.0);
        assert_eq!(paragraph_zh("段落3，或者段落12", "段落12"), 0.5);
        assert_eq!(count("There are 7 of 30", "7"), 0.5);
        assert_eq!(count("07", "7"), 0.0);
        assert_eq!(count("", "7"), 0.0);
    }
}

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment in UTC, for chat templates that tell the model the date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Date {
    /// Days since 1970-01-01, which was a Thursday.
    days: i64,
    /// Seconds since midnight.
    seconds: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

impl Date {
    pub(crate) fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { days: (now / 86_400) as i64, seconds: (now % 86_400) as u32 }
    }

    /// Midnight of a day of the proleptic Gregorian calendar; `None` when there is no such day.
    pub(crate) fn new(year: i32, month: u32, day: u32) -> Option<Self> {
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        let date = Self { days: days_before(year) + day_of_year(year, month, day), seconds: 0 };
        (date.civil() == (year, month, day)).then_some(date)
    }

    /// Formats as Python's `strftime` in the C locale does. `Err` holds the first directive that
    /// is not one of `%a %A %b %B %d %H %I %j %m %M %p %S %y %Y %%`.
    pub(crate) fn strftime(self, format: &str) -> Result<String, String> {
        let (year, month, day) = self.civil();
        let weekday = WEEKDAYS[self.days.rem_euclid(7) as usize];
        let month_name = MONTHS[month as usize - 1];
        let (hour, minute, second) =
            (self.seconds / 3600, self.seconds / 60 % 60, self.seconds % 60);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let directive = chars.next();
            out += &match directive {
                Some('a') => weekday[..3].to_owned(),
                Some('A') => weekday.to_owned(),
                Some('b') => month_name[..3].to_owned(),
                Some('B') => month_name.to_owned(),
                Some('d') => format!("{day:02}"),
                Some('H') => format!("{hour:02}"),
                Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
                Some('j') => format!("{:03}", self.days - days_before(year) + 1),
                Some('m') => format!("{month:02}"),
                Some('M') => format!("{minute:02}"),
                Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
                Some('S') => format!("{second:02}"),
                Some('y') => format!("{:02}", year.rem_euclid(100)),
                Some('Y') => format!("{year:04}"),
                Some('%') => "%".to_owned(),
                Some(other) => return Err(format!("%{other}")),
                None => return Err("%".to_owned()),
            };
        }
        Ok(out)
    }

    /// Year, month and day.
    fn civil(self) -> (i32, u32, u32) {
        // Start from a year that is never too late and at most two years early.
        let mut year = (self.days.div_euclid(366) + 1970) as i32;
        if self.days < 0 {
            year = (self.days.div_euclid(365) + 1970) as i32;
        }
        while days_before(year + 1) <= self.days {
            year += 1;
        }
        let day = self.days - days_before(year);
        let month = (1..12).find(|m| day_of_year(year, m + 1, 1) > day).unwrap_or(12);
        (year, month, (day - day_of_year(year, month, 1) + 1) as u32)
    }
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: i32) -> i64 {
    let past = i64::from(year) - 1;
    let leap_days = past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400);
    365 * past + leap_days - 719_162
}

/// Days from the first of January to a day of the same year.
fn day_of_year(year: i32, month: u32, day: u32) -> i64 {
    const BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    BEFORE[month as usize - 1] + i64::from(leap && month > 2) + i64::from(day) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_of_known_dates() {
        for ((year, month, day), days, weekday) in [
            ((1970, 1, 1), 0, "Thursday"),
            ((2000, 2, 29), 11_016, "Tuesday"),
            ((2024, 7, 26), 19_930, "Friday"),
            ((2100, 3, 1), 47_541, "Monday"),
            ((1969, 12, 31), -1, "Wednesday"),
        ] {
            let date = Date::new(year, month, day).unwrap();
            assert_eq!((date.days, date.civil()), (days, (year, month, day)));
            assert_eq!(date.strftime("%A").unwrap(), weekday);
        }
        assert!(Date::new(2023, 2, 29).is_none() && Date::new(2023, 13, 1).is_none());
    }

    #[test]
    fn every_day_comes_after_the_one_before() {
        let mut last = Date { days: -1000, seconds: 0 }.civil();
        for days in -999..60_000 {
            let civil = Date { days, seconds: 0 }.civil();
            assert!(civil > last, "{civil:?} after {last:?}");
            assert_eq!(Date::new(civil.0, civil.1, civil.2).map(|date| date.days), Some(days));
            last = civil;
        }
    }

    #[test]
    fn directives() {
        let date = Date { seconds: 13 * 3600 + 5 * 60 + 9, ..Date::new(2024, 7, 6).unwrap() };
        let all = date.strftime("%a %b %B %d %H %I %j %m %M %p %S %y %Y 100%%").unwrap();
        assert_eq!(all, "Sat Jul July 06 13 01 188 07 05 PM 09 24 2024 100%");
        assert_eq!(date.strftime("%Q"), Err("%Q".into()));
        assert_eq!(date.strftime("50%"), Err("%".into()));
    }
}

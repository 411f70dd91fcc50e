//! The rules of `domain/account.py`.

use cqrs_es::event_sink::EventSink;
use cqrs_es::{Aggregate, DomainEvent};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", content = "payload")]
pub enum Command {
    OpenAccount {
        account_id: String,
    },
    DepositMoney {
        amount: Decimal,
    },
    WithdrawMoney {
        amount: Decimal,
        atm_id: String,
    },
    WriteCheck {
        amount: Decimal,
        check_number: String,
    },
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Event {
    AccountOpened {
        account_id: String,
    },
    CustomerDepositedMoney {
        amount: Decimal,
        balance: Decimal,
    },
    CustomerWithdrewCash {
        amount: Decimal,
        balance: Decimal,
        atm_id: String,
    },
    CustomerWroteCheck {
        amount: Decimal,
        balance: Decimal,
        check_number: String,
    },
}

impl DomainEvent for Event {
    fn event_type(&self) -> String {
        match self {
            Event::AccountOpened { .. } => "AccountOpened",
            Event::CustomerDepositedMoney { .. } => "CustomerDepositedMoney",
            Event::CustomerWithdrewCash { .. } => "CustomerWithdrewCash",
            Event::CustomerWroteCheck { .. } => "CustomerWroteCheck",
        }
        .into()
    }

    fn event_version(&self) -> String {
        "1".into()
    }
}

/// The bank says no.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    #[error("account already open")]
    AlreadyOpen,
    #[error("account not open")]
    NotOpen,
    #[error("funds not available")]
    FundsNotAvailable,
    #[error("not an amount that can be paid")]
    Amount,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Account {
    account_id: Option<String>,
    balance: Decimal,
}

impl Account {
    fn decide(&self, command: Command) -> Result<Event, RuleError> {
        let open = self.account_id.is_some();
        match command {
            Command::OpenAccount { .. } if open => Err(RuleError::AlreadyOpen),
            Command::OpenAccount { account_id } => Ok(Event::AccountOpened { account_id }),
            _ if !open => Err(RuleError::NotOpen),
            Command::DepositMoney { amount } => {
                let balance = self.balance + checked(amount)?;
                Ok(Event::CustomerDepositedMoney { amount, balance })
            }
            Command::WithdrawMoney { amount, atm_id } => {
                let balance = self.after_paying(amount)?;
                Ok(Event::CustomerWithdrewCash {
                    amount,
                    balance,
                    atm_id,
                })
            }
            Command::WriteCheck {
                amount,
                check_number,
            } => {
                let balance = self.after_paying(amount)?;
                Ok(Event::CustomerWroteCheck {
                    amount,
                    balance,
                    check_number,
                })
            }
        }
    }

    fn after_paying(&self, amount: Decimal) -> Result<Decimal, RuleError> {
        match self.balance - checked(amount)? {
            left if left < Decimal::ZERO => Err(RuleError::FundsNotAvailable),
            left => Ok(left),
        }
    }
}

fn checked(amount: Decimal) -> Result<Decimal, RuleError> {
    let most = Decimal::new(99_999_999_999_999, 2);
    if amount > Decimal::ZERO && amount <= most && amount.scale() <= 2 {
        Ok(amount)
    } else {
        Err(RuleError::Amount)
    }
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Command = Command;
    type Event = Event;
    type Error = RuleError;
    type Services = ();

    async fn handle(
        &mut self,
        command: Command,
        _: &(),
        sink: &EventSink<Self>,
    ) -> Result<(), RuleError> {
        let event = self.decide(command)?;
        sink.write(event, self).await;
        Ok(())
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::AccountOpened { account_id } => self.account_id = Some(account_id),
            Event::CustomerDepositedMoney { balance, .. }
            | Event::CustomerWithdrewCash { balance, .. }
            | Event::CustomerWroteCheck { balance, .. } => self.balance = balance,
        }
    }
}

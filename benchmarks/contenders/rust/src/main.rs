//! The crates as a contender: `bank STORE_URL AT_ONCE`, a round for each path on standard input.
//!
//! So many commands are in progress at once; those of one account keep their order, as a
//! conflict would be the caller's to try again.

mod account;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use account::{Account, Command};
use cqrs_es::{AggregateError, CqrsFramework, EventStore};
use futures::future::try_join_all;
use serde::Deserialize;
use sqlx::Executor;
use sqlx::mysql::MySqlPoolOptions;
use sqlx::postgres::PgPoolOptions;
use tokio::io::{AsyncBufReadExt, BufReader, stdin};

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone, Deserialize)]
struct Message {
    aggregate_id: String,
    #[serde(flatten)]
    command: Command,
}

/// The columns that the crates read and write; texts are keys in MySQL only with a length.
fn table(text: &str) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS events (aggregate_type {text} NOT NULL, \
         aggregate_id {text} NOT NULL, sequence BIGINT NOT NULL, event_type TEXT NOT NULL, \
         event_version TEXT NOT NULL, payload JSON NOT NULL, metadata JSON NOT NULL, \
         PRIMARY KEY (aggregate_type, aggregate_id, sequence))"
    )
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    let (url, at_once) = (arguments[1].as_str(), arguments[2].parse::<u32>()?);
    if url.starts_with("mysql") {
        let pool = MySqlPoolOptions::new()
            .max_connections(at_once)
            .connect(url)
            .await?;
        pool.execute(table("VARCHAR(255)").as_str()).await?;
        serve(mysql_es::mysql_cqrs(pool, vec![], ()), at_once).await
    } else {
        let pool = PgPoolOptions::new()
            .max_connections(at_once)
            .connect(url)
            .await?;
        pool.execute(table("TEXT").as_str()).await?;
        serve(postgres_es::postgres_cqrs(pool, vec![], ()), at_once).await
    }
}

async fn serve<S>(bank: CqrsFramework<Account, S>, at_once: u32) -> Result<(), Failure>
where
    S: EventStore<Account, AC: Send> + 'static,
{
    let bank = Arc::new(bank);
    let mut paths = BufReader::new(stdin()).lines();
    while let Some(path) = paths.next_line().await? {
        let messages: Vec<Message> = serde_json::from_slice(&std::fs::read(path)?)?;
        let mut lanes = vec![Vec::new(); at_once as usize];
        for message in messages {
            let mut hasher = DefaultHasher::new();
            message.aggregate_id.hash(&mut hasher);
            lanes[(hasher.finish() % u64::from(at_once)) as usize].push(message);
        }
        let (began, cpu) = (Instant::now(), cpu_seconds()?);
        let running = lanes
            .into_iter()
            .map(|lane| tokio::spawn(run(bank.clone(), lane)));
        let ended: Result<Vec<usize>, Failure> = try_join_all(running).await?.into_iter().collect();
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
        let accepted: usize = ended?.into_iter().sum();
        println!(
            "{}",
            serde_json::json!({"seconds": seconds, "cpu": cpu, "accepted": accepted})
        );
    }
    Ok(())
}

/// Execute commands one after the other; return how many were accepted.
async fn run<S: EventStore<Account>>(
    bank: Arc<CqrsFramework<Account, S>>,
    messages: Vec<Message>,
) -> Result<usize, Failure> {
    let mut accepted = 0;
    for message in messages {
        match bank.execute(&message.aggregate_id, message.command).await {
            Ok(()) => accepted += 1,
            Err(AggregateError::UserError(_)) => (),
            Err(error) => return Err(error.to_string().into()),
        }
    }
    Ok(accepted)
}

/// Return user and system time of this process [proc(5), fields 14 and 15 of stat, in 1/100 s].
fn cpu_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

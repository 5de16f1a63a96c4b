//! Two processes exchange a message through a DMB. In one terminal: `exchange HUB`, which prints its GID; in another one:
//! `exchange HUB GID`.

use dmbridge::{Device, Event, Token};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let device = Device::connect(args.next().ok_or("usage: exchange HUB [READER]")?)?;
    let next_event = || match device.events().next(None)? {
        Some(Event::Software { from, info, .. }) => Ok((from, info)),
        other => Err::<_, Box<dyn std::error::Error>>(format!("not what was expected: {other:?}").into()),
    };
    if let Some(reader) = args.next() {
        device.signal_event(reader.parse()?, 0, 0)?; // here I am
        let (_, token) = next_event()?;
        let dmb = device.attach(Token::from_bits(token))?;
        dmb.write(0, b"Hello through a DMB.")?;
        dmb.signal(1)?;
    } else {
        println!("{}", device.gid());
        let (writer, _) = next_event()?;
        let dmb = device.register(writer, 4096)?;
        device.signal_event(writer, 0, dmb.token().to_bits())?;
        dmb.wait(None)?;
        let mut text = [0; 20];
        dmb.memory().read(0, &mut text)?;
        println!("{}", String::from_utf8_lossy(&text));
    }
    Ok(())
}

//! The command.
fn main() {
    let mut args = std::env::args_os().skip(1);
    let (source, output) = (args.next().unwrap(), args.next().unwrap());
    match bitnet_pack::pack(source.as_ref(), output.as_ref(), &Default::default(), &mut ()) {
        Ok(report) => println!("{report}"),
        Err(e) => println!("error: {e}"),
    }
}

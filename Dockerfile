# Stops within the 10 seconds that `docker stop` allows; for longer answers `docker run --stop-timeout 40 .. --grace 30`.
# docker build -t moa . && docker run -p 8080:8080 -v ./model:/model:ro moa --model /model
# Both of one Debian, so that the C library is no newer than the one it runs on.
FROM rust:1.95-slim-trixie AS build
WORKDIR /moa
COPY . .
RUN cargo build --release --locked -p moa-cli

FROM debian:trixie-slim
RUN useradd --system moa
COPY --from=build /moa/target/release/moa /usr/local/bin/moa
USER moa
EXPOSE 8080
ENTRYPOINT ["moa", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/model"]
